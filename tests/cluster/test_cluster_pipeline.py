"""The smallest configuration through SLURM, from images to report; and whom SLURM gives which GPU."""

import re
from pathlib import Path

import pytest

import cluster_workflow
import workflow_rig
from cluster_workflow import AUTO, ClusterWorkflow
from slurm_rig import Slurm
from workflow_rig import Workflow, assert_same_results

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1800)]

ON_GPU = {"degrade", "embeddings", "rollout", "score", "encode", "train"}  # rules, and groups of the profile
ON_CPU = {"ingest", "prompts", "niqe", "derive", "pairs", "report"}

THREE = """
rule all:
    input: "a.txt", "b.txt", "c.txt"
rule use:
    output: "{name}.txt"
    resources: mem_mb=100, runtime=5, gpu=1, slurm_extra="--nodelist=sim1"
    shell: "echo ${{CUDA_VISIBLE_DEVICES:-}} $(date +%s.%N) > {output}.part; sleep 8; date +%s.%N >> {output}.part;"
        " mv {output}.part {output}"
"""


def gpus_by_rule(workflow: ClusterWorkflow) -> dict[str, set[str]]:
    """Return what the jobs of each rule or group asked for, all of them completed."""
    found: dict[str, set[str]] = {}
    text = workflow.slurm.client(
        "squeue", "-h", "--states=all", "-O", "workdir:300,tres-per-job:30,state:20,comment:200"
    )
    for line in text.splitlines():
        folder, asked, state, comment = line.split(maxsplit=3)
        if Path(folder) == workflow.directory:
            assert state == "COMPLETED", line
            named = re.match(rf"rule_({'|'.join(ON_GPU | ON_CPU)})", comment)
            assert named, line
            found.setdefault(named[1], set()).add(asked)
    return found


def test_smallest_to_report(smallest: Workflow, tiny_model: Path, slurm: Slurm, tmp_path: Path) -> None:
    """As an undisturbed local run, byte for byte; neither kind of run then finds anything to do."""
    workflow = cluster_workflow.smallest(tmp_path / "run", tiny_model, slurm)
    with workflow.driver() as driver:
        workflow.finish(driver, timeout=1500)
    assert_same_results(workflow.directory / "results", smallest.directory / "results")
    workflow.assert_left_clean()
    assert workflow.plan(changes=AUTO) == []
    assert workflow_rig.smallest(workflow.directory, tiny_model).plan() == []
    asked = gpus_by_rule(workflow)
    assert asked == {name: {"gres:gpu:1"} for name in ON_GPU} | {name: {"N/A"} for name in ON_CPU}


def test_two_gpus_three_jobs(slurm: Slurm, tmp_path: Path) -> None:
    """Two jobs of one GPU each run at once on a node of two, each sees its own, and the third waits for one of them."""
    (tmp_path / "Snakefile").write_text(THREE)
    workflow = ClusterWorkflow(tmp_path, slurm=slurm, snakefile=tmp_path / "Snakefile")
    with workflow.driver() as driver:
        workflow.finish(driver, timeout=120)
    jobs = []
    for name in "abc":
        device, start, end = (tmp_path / f"{name}.txt").read_text().split()
        jobs.append((float(start), float(end), device))
    first, second, third = sorted(jobs)
    assert second[0] < first[1], "the first two did not run at once"
    assert third[0] >= min(first[1], second[1]), "the third did not wait"
    assert {first[2], second[2]} == {"0", "1"} and third[2] in ("0", "1")
    workflow.assert_left_clean()
