"""A cluster announces the end of a job: it keeps what is in hand and fails, and its next try goes on from there."""

import contextlib
import re
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import psutil
import pytest

import cluster_workflow
from cluster_workflow import ClusterWorkflow
from dp2osr import tables
from slurm_rig import Slurm, wait_for
from workflow_rig import Workflow

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

OUTPUT = "results/train/base/candidates/shard-0000.block-000.tar"
LOG = "results/logs/train/base/rollout/shard-0000.block-000.log"
# SLURM looks for who is to be warned about twice a minute.
SHORT = ["--set-resources", "rollout:runtime=2*attempt", "rollout:slurm_extra='--signal=TERM@30'"]
START_S = 400  # until a job's stage works


@pytest.fixture
def workflow(smallest: Workflow, tiny_model: Path, slurm: Slurm, tmp_path: Path) -> ClusterWorkflow:
    """Return a copy of the finished run."""
    shutil.copytree(smallest.directory, tmp_path / "run", symlinks=True)
    return cluster_workflow.smallest(tmp_path / "run", tiny_model, slurm)


def pending(process: psutil.Process) -> bool:
    """Whether SIGTERM waits for a process that stands still."""
    status = Path(f"/proc/{process.pid}/status")
    text = status.read_text() if status.exists() else ""
    masks = re.findall(r"^(?:SigPnd|ShdPnd):\s*(\w+)", text, re.MULTILINE)
    return any(int(mask, 16) & 1 << (signal.SIGTERM - 1) for mask in masks)


@dataclass
class Told:
    """A run that has one rollout to make: its stage stands still from the first batch on, until it is told to end."""

    workflow: ClusterWorkflow
    wanted: Path
    kept: int = 0

    @contextlib.contextmanager
    def stage(self, *options: str, timeout: float) -> Iterator[psutil.Process]:
        """Yield the stage, standing still; after the block wait for SIGTERM, and until the next try has ended well."""
        (self.workflow.directory / OUTPUT).unlink()
        with self.workflow.driver(OUTPUT, *options) as driver:
            process = self._stopped(driver)
            yield process
            self._go_on(process, timeout)
            self.workflow.finish(driver, timeout=500)
        self._check()

    def batches(self) -> list[Path]:
        """Return the batches that are kept."""
        return list((self.workflow.directory / f"{OUTPUT}.parts").glob("*/batch-*"))

    def log(self) -> str:
        """Return what the stage said."""
        return (self.workflow.directory / LOG).read_text()

    def _stopped(self, driver: psutil.Popen) -> psutil.Process:
        def working() -> bool:
            assert driver.poll() is None, self.workflow.log.read_text()[-6000:]
            return bool(self.batches())

        wait_for(working, f"a batch\n{self.workflow.queue()}", START_S)
        process = self.workflow.payload(OUTPUT)
        assert process, "all was over before it could be stopped"
        process.send_signal(signal.SIGSTOP)
        return process

    def _go_on(self, process: psutil.Process, timeout: float) -> None:
        def told() -> bool:
            return "SIGTERM" in self.log() or pending(process)

        wait_for(told, f"SIGTERM\n{self.workflow.queue()}", timeout)
        with contextlib.suppress(psutil.NoSuchProcess):  # a preemption sends SIGCONT itself
            process.send_signal(signal.SIGCONT)
        wait_for(lambda: "stopped by SIGTERM after" in self.log(), "the stage's last words", 60)
        self.kept = len(self.batches())

    def _check(self) -> None:
        """The next try took up all that was kept, and the file is that of the undisturbed run."""
        assert f"batches, {self.kept} of them kept from an earlier attempt" in self.log()
        made = self.workflow.directory / OUTPUT
        assert made.read_bytes() == self.wanted.read_bytes()
        assert [path.name for path in made.parent.iterdir()] == [made.name]
        self.workflow.assert_left_clean()


@pytest.fixture
def told(workflow: ClusterWorkflow, smallest: Workflow) -> Told:
    """Return a run whose rollout is told to end."""
    return Told(workflow, smallest.directory / OUTPUT)


def test_warned_before_the_time_limit(told: Told, slurm: Slurm) -> None:
    with told.stage(*SHORT, timeout=400) as process:
        job = process.environ()["SLURM_JOB_ID"]
    assert slurm.state(job) == "FAILED"


def test_only_slurms_own_process_is_told(told: Told) -> None:
    """As under cgroups: Snakemake, which SLURM started, gets SIGTERM; its shell and the stage do not."""
    with told.stage(timeout=20) as process:
        next(each for each in process.parents() if "snakemake" in each.cmdline()).terminate()


def test_preempted(told: Told, slurm: Slurm) -> None:
    """A job of a higher partition takes the node; ours has a minute, and its next try waits for a place."""
    with told.stage(timeout=60) as process:
        job, node = (process.environ()[name] for name in ("SLURM_JOB_ID", "SLURMD_NODENAME"))
        command = ["sbatch", "--parsable", "-p", "urgent", "-w", node, "--exclusive", "--output=/dev/null"]
        urgent = slurm.client(*command, "--wrap", "sleep 3").strip()
    assert [slurm.state(each) for each in (job, urgent)] == ["FAILED", "COMPLETED"]


def test_training_on_two_nodes(
    workflow: ClusterWorkflow, smallest: Workflow, slurm: Slurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One process on each node, as one process alone; both nodes are this machine, and their names lead nowhere."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    run = workflow.directory / "results" / "runs" / "default"
    for name in ("policy", "checkpoints"):
        shutil.rmtree(run / name)
    with workflow.driver("results/runs/default/policy", changes={"limits": {"train_nodes": 2}}) as driver:
        workflow.finish(driver, timeout=500)
    jobs = slurm.client("squeue", "-h", "--states=all", "-O", "workdir:300,nodelist:30,state:20").splitlines()
    assert [line.split()[1:] for line in jobs if line.split()[0] == str(workflow.directory)] == [
        ["sim[1-2]", "COMPLETED"]
    ]
    found, wanted = (
        tables.read(folder / "runs/default/train_log.parquet", tables.TRAIN_LOG).drop(columns="pairs_per_second")
        for folder in (workflow.directory / "results", smallest.directory / "results")
    )
    pd.testing.assert_frame_equal(found, wanted, rtol=1e-3, atol=1e-5)
    assert (workflow.directory / "results/logs/runs/default/train.log").read_text().count("device cpu") == 2
