"""A cluster announces the end of a job: it keeps what is in hand and fails, and its next try goes on from there."""

import contextlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import psutil
import pytest

import cluster_workflow
import workflow_rig
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

POLICY = "results/runs/default/policy"
TRAIN = "dp2osr.stages.train"
WEIGHTS = "diffusion_pytorch_model.safetensors"
TRAIN_LOG = "results/logs/runs/default/train.log"
TWO_NODES = {"limits": {"train_nodes": 2}}
# Steps enough to be in the midst of them; a checkpoint is there only where a signal asked for it.
LONGER = {"runs": {"default": {"train": {"steps": 12, "checkpoint_every": 1000, "guard": {"every": 0}}}}}
ONE_THREAD = ["--set-threads", "train=1"]  # two processes, two cores, and other work


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


@pytest.fixture
def two_nodes(workflow: ClusterWorkflow, monkeypatch: pytest.MonkeyPatch) -> ClusterWorkflow:
    """Return the finished run without its policy; both nodes are this machine, and their names lead nowhere."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    run = workflow.directory / "results" / "runs" / "default"
    for name in ("policy", "checkpoints"):
        shutil.rmtree(run / name)
    return workflow


def train_log(results: Path) -> pd.DataFrame:
    """Return the log of a results folder's training, without what the clock says."""
    return tables.read(results / "runs/default/train_log.parquet", tables.TRAIN_LOG).drop(columns="pairs_per_second")


def test_training_on_two_nodes(two_nodes: ClusterWorkflow, smallest: Workflow, slurm: Slurm) -> None:
    """One process on each node, as one process alone."""
    with two_nodes.driver(POLICY, changes=TWO_NODES) as driver:
        two_nodes.finish(driver, timeout=500)
    jobs = slurm.client("squeue", "-h", "--states=all", "-O", "workdir:300,nodelist:30,state:20").splitlines()
    assert [line.split()[1:] for line in jobs if line.split()[0] == str(two_nodes.directory)] == [
        ["sim[1-2]", "COMPLETED"]
    ]
    found, wanted = (train_log(folder / "results") for folder in (two_nodes.directory, smallest.directory))
    steep = ["loss", "abs_logit", "grad_norm"]  # z is beta / 2 = 2500 times a difference of errors, rounded at 1e-7
    pd.testing.assert_frame_equal(found.drop(columns=steep), wanted.drop(columns=steep), rtol=1e-3, atol=1e-5)
    pd.testing.assert_frame_equal(found[steep], wanted[steep], rtol=1e-3, atol=2500 * 1e-7)
    assert (two_nodes.directory / TRAIN_LOG).read_text().count("device cpu") == 2


@dataclass
class Spread:
    """A training over both nodes, try after try."""

    workflow: ClusterWorkflow
    driver: psutil.Popen
    jobs: list[str] = field(default_factory=list)

    def begun(self, words: str) -> list[psutil.Process]:
        """Wait until both processes of a new try have said this, in the midst of their steps; process 0 comes first."""
        found: dict[str, psutil.Process] = {}

        def both() -> bool:
            assert self.driver.poll() is None, self.workflow.log.read_text()[-6000:]
            found.update(self._processes())
            return len(found) == 2 and self.log().count(words) == 2

        wait_for(both, f"{words}\n{self.workflow.queue()}", START_S)
        self.jobs.append(found["0"].environ()["SLURM_JOB_ID"])
        return [found["0"], found["1"]]

    def _processes(self) -> dict[str, psutil.Process]:
        found: dict[str, psutil.Process] = {}
        for process in self.workflow.payloads(POLICY):
            with contextlib.suppress(psutil.Error, KeyError):
                found[process.environ()["RANK"]] = process
        return found

    def log(self) -> str:
        """Return what the training said; each try begins the file anew."""
        path = self.workflow.directory / TRAIN_LOG
        return path.read_text() if path.exists() else ""

    def stopped(self, processes: list[psutil.Process]) -> int:
        """Wait until SIGTERM has ended both; return the step that both name, and of which the newest checkpoint is."""
        _, alive = psutil.wait_procs(processes, timeout=60)
        steps = re.findall(r"step (\d+): stopped by SIGTERM", self.log())
        kept = (self.workflow.directory / "results/runs/default/checkpoints").glob("*/step-*")
        assert not alive and len(steps) == 2 and steps[0] == steps[1] != "12", self.log()
        assert max(path.name for path in kept) == f"step-{int(steps[0]):06d}"
        return int(steps[0])


@pytest.fixture(scope="module")
def undisturbed(smallest: Workflow, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the results of a longer training by two processes of one launcher, without SLURM."""
    folder = tmp_path_factory.mktemp("longer") / "run"
    shutil.copytree(smallest.directory, folder, symlinks=True)
    local = workflow_rig.smallest(folder, tiny_model)
    said = local.snakemake("--dry-run", "--printshellcmds", "--", POLICY, changes=LONGER).stdout
    found = re.search(rf"python (-m {TRAIN} .*) 2> ", said)
    assert found, said[-3000:]
    command = f"OMP_NUM_THREADS=1 {shlex.quote(sys.executable)} {found[1]} --processes 2"
    subprocess.run(command, shell=True, cwd=folder, check=True, timeout=400)
    return folder / "results"


def snakemakes_above_srun(workflow: ClusterWorkflow) -> list[psutil.Process]:
    """Return the processes of Snakemake in the job of a training on several nodes: SLURM's own, and what it starts."""
    (srun, *_) = (each for each in workflow.slurm.processes() if each.name() == "srun" and TRAIN in each.cmdline())
    return [each for each in srun.parents() if "snakemake" in each.cmdline()]


def test_two_nodes_told_and_killed(two_nodes: ClusterWorkflow, undisturbed: Path, slurm: Slurm) -> None:
    """Warned, preempted, and one process lost: each try ends soon and the next one goes on, to the same policy."""
    with two_nodes.driver(POLICY, *ONE_THREAD, "--retries", "3", changes=LONGER | TWO_NODES) as driver:
        training = Spread(two_nodes, driver)
        processes = training.begun("step 1 of 12")
        processes[1].send_signal(signal.SIGSTOP)  # the other one waits for it
        for each in snakemakes_above_srun(two_nodes):
            each.terminate()
        slurm.client("scancel", "--signal=TERM", training.jobs[-1])  # as `--signal=TERM@120` before the time limit
        wait_for(lambda: pending(processes[1]), "SIGTERM", 60)
        processes[1].send_signal(signal.SIGCONT)
        kept = training.stopped(processes)
        processes = training.begun(f"going on from step {kept} ")
        processes[1].send_signal(signal.SIGSTOP)  # a preemption lets it go on
        command = ["sbatch", "--parsable", "-p", "urgent", "-w", "sim2", "--exclusive", "--output=/dev/null"]
        urgent = slurm.client(*command, "--wrap", "sleep 3").strip()
        kept = training.stopped(processes)
        processes = training.begun(f"going on from step {kept} ")
        processes[1].kill()
        _, alive = psutil.wait_procs(processes, timeout=30)
        assert not alive, "the other process waits for the lost one"
        two_nodes.finish(driver, timeout=500)
    assert [slurm.state(job) for job in training.jobs] == ["FAILED"] * 3 and slurm.state(urgent) == "COMPLETED"
    assert training.log().count(f"going on from step {kept} ") == 2
    pd.testing.assert_frame_equal(train_log(two_nodes.directory / "results"), train_log(undisturbed), check_exact=True)
    found, wanted = (
        folder / "runs/default/policy" / WEIGHTS for folder in (two_nodes.directory / "results", undisturbed)
    )
    assert found.read_bytes() == wanted.read_bytes()
    two_nodes.assert_left_clean()
