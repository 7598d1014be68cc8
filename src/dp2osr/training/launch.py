"""Processes of a training, and what produced it."""

import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


def needs_launch(processes: int, device: str) -> int:
    """Return how many processes to start: `processes`, or one a visible GPU where that is 0; 1 inside a launch."""
    if "RANK" in os.environ:
        return 1
    gpus = 0 if device == "cpu" else torch.cuda.device_count()
    return processes or max(gpus, 1)


def relaunch(module: str, argv: Sequence[str], *, processes: int) -> None:
    """Replace this process by torch's launcher, which runs `python -m module argv` in `processes` processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *launcher, "-m", module, *argv]
    os.execv(sys.executable, command)


def provenance() -> dict[str, Any]:
    """Return versions of what computes, and the git commit of the code where there is one."""
    packages = ("dp2o-sr", "torch", "diffusers", "accelerate")
    folder = Path(__file__).parent
    git = ["git", "-C", str(folder), "rev-parse", "HEAD"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, timeout=10, check=False).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        commit = ""
    versions = {"python": platform.python_version()} | {name: version(name) for name in packages}
    return {"versions": versions, "commit": commit}
