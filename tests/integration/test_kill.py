"""SIGKILL to Snakemake and its jobs at random moments: the rerun ends with the results of an undisturbed run."""

import random
import shutil
from pathlib import Path

import pytest

from workflow_rig import Workflow, assert_same_results
from workflow_rig import smallest as smallest_workflow

KILLS = 4


@pytest.mark.slow
def test_killed_at_random_moments(smallest: Workflow, tiny_model: Path, tmp_path: Path) -> None:
    victim = smallest_workflow(tmp_path, tiny_model)
    moments = random.Random(0)
    killed = sum(victim.start_and_kill(after_s=moments.uniform(12, 40)) for _ in range(KILLS))
    assert killed, "the workflow ended before the first kill"
    victim.snakemake("--unlock")
    victim.run("--rerun-incomplete")
    assert_same_results(victim.directory / "results", smallest.directory / "results")
    left = [path for path in (victim.directory / "results").rglob("*") if path.name.endswith(".parts")]
    assert left == [], "finished jobs remove their parts"


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["rollout", "score", "train"])
def test_a_stage_killed_twice(smallest: Workflow, tiny_model: Path, tmp_path: Path, rule: str) -> None:
    shutil.copytree(smallest.directory, tmp_path / "copy", symlinks=True)
    victim = smallest_workflow(tmp_path / "copy", tiny_model)
    moments = random.Random(rule)
    for _ in range(2):
        victim.start_and_kill("--forcerun", rule, "--until", rule, after_s=moments.uniform(8, 20))
    victim.snakemake("--unlock")
    victim.run("--rerun-incomplete", "--forcerun", rule)
    assert_same_results(victim.directory / "results", smallest.directory / "results")
