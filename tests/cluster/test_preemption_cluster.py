"""A cluster announces the end of a job: it keeps what is in hand and fails, and its next try goes on from there."""

import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

import cluster_workflow
from cluster_workflow import ClusterWorkflow
from slurm_rig import Slurm, wait_for
from workflow_rig import Workflow

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

TRAIN, HOLDOUT = (f"results/{name}/base/candidates/shard-0000.block-000.tar" for name in ("train", "holdout"))
LOGS = {name: f"results/logs/{name}/base/rollout/shard-0000.block-000.log" for name in ("train", "holdout")}
# A minute and a half before the time limit of two minutes: SLURM looks once or twice a minute.
SHORT = ["--set-resources", "rollout:runtime=2 * attempt", "rollout:slurm_extra='--signal=TERM@90'"]
START_S = 200  # until a job's stage runs: seconds on an idle machine


@pytest.fixture
def left(smallest: Workflow, tiny_model: Path, slurm: Slurm, tmp_path: Path) -> Callable[..., ClusterWorkflow]:
    """Return a function that makes a finished run without some of its files, whose stages sample one image at once."""

    def without(*outputs: str) -> ClusterWorkflow:
        shutil.copytree(smallest.directory, tmp_path / "run", symlinks=True)
        workflow = cluster_workflow.smallest(tmp_path / "run", tiny_model, slurm)
        for output in outputs:
            (workflow.directory / output).unlink()
        return workflow

    return without


def pending(process: psutil.Process) -> bool:
    """Whether SIGTERM waits for a process that stands still."""
    text = Path(f"/proc/{process.pid}/status").read_text()
    masks = re.findall(r"^(?:SigPnd|ShdPnd):\s*(\w+)", text, re.MULTILINE)
    return any(int(mask, 16) & 1 << (signal.SIGTERM - 1) for mask in masks)


def stopped(workflow: ClusterWorkflow, driver: psutil.Popen, output: str) -> psutil.Process:
    """Wait until the stage that makes a file has kept a batch, and let it stand still."""
    parts = workflow.directory / f"{output}.parts"

    def working() -> bool:
        assert driver.poll() is None, workflow.log.read_text()[-6000:]
        return bool(list(parts.glob("*/batch-*")))

    wait_for(working, f"a batch of {output}\n{workflow.queue()}", START_S)
    process = workflow.payload(output)
    assert process, "all was over before it could be stopped"
    process.send_signal(signal.SIGSTOP)
    return process


def go_on(workflow: ClusterWorkflow, process: psutil.Process, output: str, log: str, timeout: float) -> int:
    """Let the stage go on once it is told; return how many batches were kept when it ended."""
    wait_for(lambda: pending(process), f"SIGTERM\n{workflow.queue()}", timeout)
    process.send_signal(signal.SIGCONT)
    text = (workflow.directory / log).read_text
    wait_for(lambda: "stopped by SIGTERM after" in text(), "the stage's last words", 60)
    return len(list((workflow.directory / f"{output}.parts").glob("*/batch-*")))


def assert_made(workflow: ClusterWorkflow, smallest: Workflow, output: str, log: str, kept: int) -> None:
    """Check that the next try took up all that was kept, and that the file is that of the undisturbed run."""
    assert f"batches, {kept} of them kept from an earlier attempt" in (workflow.directory / log).read_text()
    made = workflow.directory / output
    assert made.read_bytes() == (smallest.directory / output).read_bytes()
    assert [path.name for path in made.parent.iterdir()] == [made.name]


def test_warned_before_the_time_limit(smallest: Workflow, left: Callable[..., ClusterWorkflow], slurm: Slurm) -> None:
    workflow = left(TRAIN)
    with workflow.driver(TRAIN, *SHORT) as driver:
        process = stopped(workflow, driver, TRAIN)
        job = process.environ()["SLURM_JOB_ID"]
        kept = go_on(workflow, process, TRAIN, LOGS["train"], timeout=120)
        workflow.finish(driver, timeout=300)
    assert slurm.state(job) == "FAILED"
    assert_made(workflow, smallest, TRAIN, LOGS["train"], kept)
    workflow.assert_left_clean()


def test_only_slurms_own_process_is_told(
    smallest: Workflow, left: Callable[..., ClusterWorkflow], slurm: Slurm
) -> None:
    """As under cgroups: Snakemake, which SLURM started, gets SIGTERM; its shell and the stage do not."""
    workflow = left(TRAIN)
    with workflow.driver(TRAIN) as driver:
        process = stopped(workflow, driver, TRAIN)
        inner = next(each for each in process.parents() if "snakemake" in each.cmdline())
        inner.terminate()
        kept = go_on(workflow, process, TRAIN, LOGS["train"], timeout=20)
        workflow.finish(driver, timeout=300)
    assert_made(workflow, smallest, TRAIN, LOGS["train"], kept)
    workflow.assert_left_clean()


def test_preempted(smallest: Workflow, left: Callable[..., ClusterWorkflow], slurm: Slurm) -> None:
    """A job of a higher partition takes the node; ours has a minute, and its next try waits for a place."""
    workflow = left(TRAIN)
    with workflow.driver(TRAIN) as driver:
        process = stopped(workflow, driver, TRAIN)
        job, node = (process.environ()[name] for name in ("SLURM_JOB_ID", "SLURMD_NODENAME"))
        command = ["sbatch", "--parsable", "-p", "urgent", "-w", node, "--exclusive", "--output=/dev/null"]
        urgent = slurm.client(*command, "--wrap", "sleep 3").strip()
        kept = go_on(workflow, process, TRAIN, LOGS["train"], timeout=60)
        workflow.finish(driver, timeout=300)
    assert [slurm.state(each) for each in (job, urgent)] == ["FAILED", "COMPLETED"]
    assert_made(workflow, smallest, TRAIN, LOGS["train"], kept)
    workflow.assert_left_clean()
