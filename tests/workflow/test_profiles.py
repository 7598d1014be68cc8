"""What jobs ask for: time limits follow the work, GPUs the device, and a profile changes no job."""

import re
from pathlib import Path
from typing import Any

import pytest

from workflow_rig import ROOT, TARGETS, Workflow

ON_GPU = {"degrade", "embed", "rollout", "score", "encode", "train"}

Asked = dict[str, dict[str, str]]


def asked(directory: Path, *arguments: str, changes: dict[str, Any] | None = None) -> Asked:
    """Return the resources of one job of each rule, from a dry run; the rules of a group are indented."""
    done = Workflow(directory).snakemake("--dry-run", *arguments, changes=changes)
    assert done.returncode == 0, done.stdout[-3000:]
    found = re.findall(r"^ *rule (\w+):\n(?:.*\n)*? +resources: (.*)$", done.stdout, re.MULTILINE)
    return {rule: dict(part.split("=", 1) for part in text.split(", ")) for rule, text in found if rule not in TARGETS}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Asked:
    """Return what the jobs of the defaults ask for."""
    return asked(tmp_path_factory.mktemp("plain"))


def test_time_limits_and_gpus(plain: Asked, tmp_path: Path) -> None:
    changes = {"policy_defaults": {"sampling": {"steps": 40}}, "limits": {"rollout": 0.3, "longest_min": 300}}
    changed = asked(tmp_path, changes=changes | {"device": "cpu"})
    assert plain["rollout"]["runtime"] == "42"  # 10 + 100 images x 16 seeds x 8 steps x 0.15 s
    assert changed["rollout"]["runtime"] == "300"  # 10 + 1600 x 40 x 0.3 s are 330
    assert plain["train"]["runtime"] == "32"  # 10 + 80 steps x 32 images x 0.5 s
    assert {rule for rule in plain if plain[rule]["runtime"] != changed[rule]["runtime"]} == {"rollout"}
    for jobs, count in ((plain, "1"), (changed, "0")):
        assert {rule: each["gpu"] for rule, each in jobs.items() if "gpu" in each} == dict.fromkeys(ON_GPU, count)


@pytest.mark.parametrize("name", ["local", "slurm"])
def test_profile_has_the_same_jobs(name: str, plain: Asked, tmp_path: Path) -> None:
    found = asked(tmp_path, "--profile", str(ROOT / "config" / "profiles" / name))
    keys = ("runtime", "mem_mb")
    assert {rule: [each[key] for key in keys] for rule, each in found.items()} == {
        rule: [each[key] for key in keys] for rule, each in plain.items()
    }
