"""What breaks on a cluster, in the middle of jobs: the run ends by itself, or after the documented commands, unchanged.

Each test starts from a finished run without some of its files, each of them one job.
"""

import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

import cluster_workflow
from cluster_workflow import ClusterWorkflow
from slurm_rig import Slurm, wait_for
from workflow_rig import ROOT, Workflow

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

TRAIN, HOLDOUT = (f"results/{name}/base/candidates/shard-0000.block-000.tar" for name in ("train", "holdout"))
SCORES = "results/holdout/bicubic/scores/light/shard-0000.block-000.parquet"
MINUTES = ["--set-resources", "score:runtime=attempt", "score:slurm_extra=''"]
START_S = 200  # until a job's stage runs: seconds on an idle machine

Left = Callable[..., ClusterWorkflow]


@pytest.fixture
def left(smallest: Workflow, tiny_model: Path, slurm: Slurm, tmp_path: Path) -> Left:
    """Return a function that makes a finished run without some of its files."""

    def without(*outputs: str) -> ClusterWorkflow:
        shutil.copytree(smallest.directory, tmp_path / "run", symlinks=True)
        workflow = cluster_workflow.smallest(tmp_path / "run", tiny_model, slurm)
        for output in outputs:
            (workflow.directory / output).unlink()
        assert len(workflow.plan(*outputs)) == len(outputs)
        return workflow

    return without


def payloads(workflow: ClusterWorkflow, driver: psutil.Popen, *outputs: str) -> list[psutil.Process]:
    """Wait until the stages that make these files run, all at once."""
    found: dict[str, psutil.Process | None] = {}

    def all_run() -> bool:
        assert driver.poll() is None, workflow.log.read_text()[-6000:]
        found.update({output: workflow.payload(output) for output in outputs})
        return all(found.values())

    wait_for(all_run, f"stages running: {outputs}\n{workflow.queue()}", START_S)
    return [process for process in found.values() if process]


def job_of(process: psutil.Process) -> str:
    """Return the SLURM job of a process."""
    return process.environ()["SLURM_JOB_ID"]


def assert_made(workflow: ClusterWorkflow, smallest: Workflow, *outputs: str) -> None:
    """Check that files are those of the undisturbed run, with nothing beside them, and nothing left to do."""
    for output in outputs:
        made = workflow.directory / output
        assert made.read_bytes() == (smallest.directory / output).read_bytes(), output
        assert [path.name for path in made.parent.iterdir()] == [made.name]
    workflow.assert_left_clean()
    assert workflow.plan(*outputs) == []


def test_jobs_killed_cancelled_and_out_of_time(smallest: Workflow, left: Left, slurm: Slurm) -> None:
    outputs = (TRAIN, HOLDOUT, SCORES)
    workflow = left(*outputs)
    with workflow.driver(*outputs, *MINUTES) as driver:
        killed, cancelled, stuck = payloads(workflow, driver, *outputs)
        jobs = [job_of(process) for process in (killed, cancelled, stuck)]
        stuck.send_signal(signal.SIGSTOP)  # until its time limit, a minute
        killed.kill()
        slurm.client("scancel", jobs[1])
        workflow.finish(driver, timeout=400)
    assert [slurm.state(job) for job in jobs] == ["FAILED", "CANCELLED", "TIMEOUT"]
    assert_made(workflow, smallest, *outputs)


@pytest.mark.parametrize("partition", ["harsh", "again"])  # PreemptMode=CANCEL, and REQUEUE
def test_preempted_without_grace(partition: str, smallest: Workflow, left: Left, slurm: Slurm) -> None:
    """SLURM calls the job PREEMPTED, for which the plugin by itself would wait for ever (src/dp2osr/preempted.py)."""
    workflow = left(TRAIN)
    there = ["--set-resources", f"rollout:slurm_partition={partition}", "rollout:slurm_extra=''"]
    with workflow.driver(TRAIN, *there) as driver:
        (process,) = payloads(workflow, driver, TRAIN)
        job, node = job_of(process), process.environ()["SLURMD_NODENAME"]
        command = ["sbatch", "--parsable", "-p", "urgent", "-w", node, "--exclusive", "--output=/dev/null"]
        slurm.client(*command, "--wrap", "sleep 3")
        workflow.finish(driver, timeout=300)
    assert slurm.state(job) == "PREEMPTED"
    assert_made(workflow, smallest, TRAIN)


def test_node_lost(smallest: Workflow, left: Left, slurm: Slurm) -> None:
    """The job of a lost node is made on the other one, though the first still writes there: nobody could stop it."""
    workflow = left(TRAIN)
    with workflow.driver(TRAIN) as driver:
        (process,) = payloads(workflow, driver, TRAIN)
        job, node = job_of(process), process.environ()["SLURMD_NODENAME"]
        slurm.kill(node)
        try:
            slurm.client("scontrol", "update", f"nodename={node}", "state=down", "reason=test")
            text = workflow.finish(driver, timeout=300)
        finally:
            slurm.start(node)
    assert slurm.state(job) == "NODE_FAIL"
    assert f"were excluded from subsequent submissions: {node}" in text
    assert_made(workflow, smallest, TRAIN)


def test_controller_restarted(smallest: Workflow, left: Left, slurm: Slurm) -> None:
    """Snakemake waits for it, and the job runs on."""
    workflow = left(TRAIN)
    with workflow.driver(TRAIN) as driver:
        (process,) = payloads(workflow, driver, TRAIN)
        job = job_of(process)
        slurm.kill("slurmctld")
        process.wait(timeout=120)
        slurm.start("slurmctld")
        workflow.finish(driver, timeout=200)
    assert slurm.state(job) == "COMPLETED"
    assert_made(workflow, smallest, TRAIN)


def test_driver_killed(smallest: Workflow, left: Left, slurm: Slurm) -> None:
    """As docs/cluster.md says: cancel, unlock, start again; and without cancelling, when two jobs write one file."""
    workflow = left(TRAIN)
    for cancel in (True, False):
        with workflow.driver(TRAIN) as driver:
            (process,) = payloads(workflow, driver, TRAIN)
            os.killpg(driver.pid, signal.SIGKILL)
        job = job_of(process)
        if cancel:
            script = ROOT / ".ci" / "cancel"
            subprocess.run([script], cwd=workflow.directory, env=slurm.environment, check=True, timeout=60)
            assert slurm.jobs() == [] and slurm.state(job) == "CANCELLED"
        assert workflow.snakemake("--unlock", changes=cluster_workflow.AUTO).returncode == 0
    with workflow.driver(TRAIN) as driver:
        workflow.finish(driver, timeout=200)
    assert slurm.state(job) == "COMPLETED"
    assert_made(workflow, smallest, TRAIN)
