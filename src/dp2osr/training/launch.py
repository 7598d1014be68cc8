"""Processes of a training, on one node or several, and what produced it."""

import os
import platform
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from dp2osr.errors import UserError
from dp2osr.stopping import TERMINATED

POLL_S = 0.1
PATIENCE_S = 30.0  # for the others once one has ended after SIGTERM: they end together
PATIENCE_ERROR_S = 3.0  # after an error: most of them wait for ever for the one that is gone


@dataclass(frozen=True)
class Place:
    """A node among those of a training: how many there are, which of them this is, and where process 0 listens."""

    nodes: int
    node: int
    address: str
    port: int

    def environment(self, processes: int, local: int) -> dict[str, str]:
        """Return what torch and accelerate read in process `local` of the `processes` of this node."""
        values = {
            "RANK": self.node * processes + local,
            "LOCAL_RANK": local,
            "WORLD_SIZE": self.nodes * processes,
            "LOCAL_WORLD_SIZE": processes,
            "MASTER_ADDR": self.address,
            "MASTER_PORT": self.port,
        }
        return {name: str(value) for name, value in values.items()}


def place(nodes: int) -> Place:
    """Return where this node stands: alone, as SLURM's srun says, or as NODE_RANK, MASTER_ADDR, MASTER_PORT say."""
    if nodes == 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            return Place(1, 0, "127.0.0.1", free.getsockname()[1])
    told = os.environ
    if "NODE_RANK" not in told and told.get("SLURM_STEP_NUM_NODES") != str(nodes):
        raise UserError(
            f"--nodes {nodes}: found SLURM_STEP_NUM_NODES={told.get('SLURM_STEP_NUM_NODES', '')} and no NODE_RANK, "
            f"wanted one launcher a node by srun --nodes={nodes} --ntasks-per-node=1, or NODE_RANK, MASTER_ADDR and "
            "MASTER_PORT"
        )
    node = int(told["NODE_RANK"] if "NODE_RANK" in told else told["SLURM_NODEID"])
    address = told.get("MASTER_ADDR") or _first_host(told["SLURM_STEP_NODELIST"])
    port = int(told.get("MASTER_PORT") or 20000 + int(told["SLURM_JOB_ID"]) % 10000)
    return Place(nodes, node, address, port)


def _first_host(nodes: str) -> str:
    command = ["scontrol", "show", "hostnames", nodes]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.split()[0]


def num_processes(processes: int, device: str) -> int:
    """Return how many processes a node gets: `processes`, or one a visible GPU where that is 0, on the CPU one."""
    gpus = 0 if device == "cpu" else torch.cuda.device_count()
    return processes or max(gpus, 1)


def needs_launch(processes: int, nodes: int) -> bool:
    """Whether processes are to be started: there are several, and this is none of them."""
    return processes * nodes > 1 and "RANK" not in os.environ


@dataclass
class Launcher:
    """Starts the processes of this node. SIGTERM goes on to them, and they decide when to end.

    torch's and accelerate's own launcher gives them 30 seconds, too short for a large checkpoint, and abandons them
    when it is told twice.
    """

    running: list[subprocess.Popen[bytes]] = field(default_factory=list)
    told: bool = False

    def run(self, module: str, argv: Sequence[str], place: Place, *, processes: int) -> int:
        """Run `python -m module argv` in each process; return 0, or the exit code of the first that failed."""
        with self._forwarding():
            for local in range(processes):
                environment = os.environ | place.environment(processes, local)
                self.running.append(subprocess.Popen([sys.executable, "-m", module, *argv], env=environment))
            if self.told:  # while they were started
                self._tell()
            try:
                return self._wait()
            finally:
                for process in self.running:
                    process.kill()
                    process.wait()

    @contextmanager
    def _forwarding(self) -> Iterator[None]:
        before = signal.signal(signal.SIGTERM, self._handle)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.told = True
        self._tell()

    def _tell(self) -> None:
        for process in self.running:
            process.terminate()

    def _wait(self) -> int:
        """Wait until all have ended, or one has failed and the others had their time."""
        end = float("inf")
        while any([process.poll() is None for process in self.running]) and time.monotonic() < end:
            if code := self._failure():
                end = min(end, time.monotonic() + (PATIENCE_S if code == TERMINATED else PATIENCE_ERROR_S))
            time.sleep(POLL_S)
        return self._failure()

    def _failure(self) -> int:
        """Return the exit code of a process that has failed, as a shell would; 0 where none has."""
        codes = [process.returncode for process in self.running if process.returncode]
        return next((128 - code if code < 0 else code for code in codes), 0)


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
