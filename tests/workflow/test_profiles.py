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
    limits = {"rollout": 0.3, "longest_min": 300, "train_gpus": 4, "train_nodes": 2}
    changes = {"policy_defaults": {"sampling": {"steps": 40}}, "limits": limits}
    changed = asked(tmp_path, changes=changes | {"device": "cpu"})
    assert plain["rollout"]["runtime"] == "42"  # 10 + 100 images x 16 seeds x 8 steps x 0.15 s
    assert changed["rollout"]["runtime"] == "300"  # 10 + 1600 x 40 x 0.3 s are 330
    assert plain["train"]["runtime"] == "32"  # 10 + 80 steps x 32 images x 0.5 s
    assert changed["train"]["runtime"] == "13"  # a share of 22 minutes for each of 8 processes
    assert changed["train"].items() >= {"nodes": "2", "tasks": "2", "mpi": "srun", "mem_mb": "64000"}.items()
    assert {rule for rule in plain if plain[rule]["runtime"] != changed[rule]["runtime"]} == {"rollout", "train"}
    for jobs, rules, count in ((plain, ON_GPU, "1"), (changed, ON_GPU - {"train"}, "0")):
        assert {rule: each["gpu"] for rule, each in jobs.items() if "gpu" in each} == dict.fromkeys(rules, count)


@pytest.mark.parametrize("name", ["local", "slurm"])
def test_profile_has_the_same_jobs(name: str, plain: Asked, tmp_path: Path) -> None:
    found = asked(tmp_path, "--profile", str(ROOT / "config" / "profiles" / name))
    warned = {rule for rule, each in found.items() if each.get("slurm_extra") == "--signal=TERM@120"}
    assert warned == ({"rollout", "score", "encode", "train"} if name == "slurm" else set())
    keys = ("runtime", "mem_mb")
    assert {rule: [each[key] for key in keys] for rule, each in found.items()} == {
        rule: [each[key] for key in keys] for rule, each in plain.items()
    }
