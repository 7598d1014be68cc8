"""SIGKILL in every stage at random moments: the rerun ends with the results of an undisturbed run.

One walk through the workflow from an empty folder. Each rule's first job is killed `--kills` times; at every third kill
Snakemake dies with it and is started again, else it sees the job fail and tries again itself.
"""

import contextlib
import csv
import logging
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from workflow_rig import CORES, TARGETS, Workflow, assert_same_results
from workflow_rig import smallest as smallest_workflow

logger = logging.getLogger(__name__)

EVERYTHING = ("figures", "prune", "pretrain")
PHASE = {"steps": 3, "batch_size": 2, "crop": 32}
CHANGES: dict[str, Any] = {
    "rollout": {"keep": "selected"},
    "pretrain": {
        "dataset": "holdout",
        "output": "results/pretrain/model",
        "pool_size": 8,
        "checkpoint_every": 2,
        "architecture": {"vae_channels": [8, 16], "unet_channels": [16, 32], "conditioning_channels": [8, 16]},
        "vae": PHASE,
        "denoiser": PHASE,
        "finetune": PHASE,
    },
}
LEFTOVER = re.compile(r"\.(parts|tmp|old|pruned)$")
TRIES = 8  # of a rule's kill, where the job ends before its moment
POLL_S = 0.02


@dataclass(frozen=True)
class Planned:
    """A job of the workflow: what it writes, and how long the undisturbed one took."""

    rule: str
    outputs: list[str]
    seconds: float


def planned_jobs(finished: Workflow) -> dict[str, Planned]:
    """Return all jobs by the path of their log, from a dry run of all that is finished."""
    jobs: dict[str, Planned] = {}
    done = finished.snakemake("--dry-run", "--forceall", *EVERYTHING, changes=CHANGES)
    for block in re.split(r"^(?=(?:local)?rule \w+:$)", done.stdout, flags=re.MULTILINE)[1:]:
        rule = block[: block.index(":")].removeprefix("local").removeprefix("rule ")
        if rule not in TARGETS:
            said = dict(re.findall(r"^ {4}(\w+): (.*)$", block, re.MULTILINE))
            with (finished.directory / said["benchmark"]).open() as table:
                seconds = float(next(csv.DictReader(table, delimiter="\t"))["s"])
            jobs[said["log"]] = Planned(rule, said["output"].split(", "), seconds)
    assert jobs, done.stdout
    return jobs


def tell(process: psutil.Process, number: signal.Signals) -> None:
    """Send a signal to a process that may have ended."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(number)


@dataclass
class Killer:
    """Runs a workflow and kills its jobs until each rule's were hit often enough."""

    victim: Workflow
    jobs: dict[str, Planned]
    kills: int
    chance: random.Random
    hits: Counter[str] = field(default_factory=Counter)
    misses: Counter[str] = field(default_factory=Counter)
    lasted: dict[str, float] = field(default_factory=dict)  # seconds of a job that ended before its moment, by rule
    unseen: set[str] = field(default_factory=set)

    def walk(self) -> None:
        """Start Snakemake again and again until no rule is left to kill."""
        while self.wanted():
            assert max(self.misses.values(), default=0) < TRIES * self.kills, (self.hits, self.misses)
            with self.session() as snakemake:
                goes_on = True
                while goes_on and self.wanted():
                    target = self.next_target(snakemake)
                    goes_on = target is not None and self.attack(snakemake, *target)
                    if target is None:
                        assert snakemake.returncode == 0, f"Snakemake failed: {self.hits}, {self.misses}"
                        self.unseen = self.wanted()  # their jobs were over before they were seen
                        self.misses.update(self.unseen)

    def wanted(self) -> set[str]:
        """Return the rules that are still to be killed."""
        return {job.rule for job in self.jobs.values() if self.hits[job.rule] < self.kills}

    def again(self) -> list[str]:
        """Return the options by which Snakemake makes what ran unseen once more, with what follows from it."""
        return ["--forcerun", *sorted(self.unseen), "--"] if self.unseen else []

    @contextlib.contextmanager
    def session(self) -> Iterator[psutil.Popen]:
        """Start Snakemake; in the end it and its jobs get SIGKILL."""
        options = ["--cores", str(CORES), "--rerun-incomplete", "--retries", str(self.kills)]
        if (self.victim.directory / ".snakemake").exists():
            options.append("--nolock")  # the lock of the first one stays
        command, environment = self.victim.command(*options, *self.again(), *EVERYTHING, changes=CHANGES)
        with (self.victim.directory / "snakemake.log").open("ab") as log:
            process = psutil.Popen(
                command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(timeout=60)

    def next_target(self, snakemake: psutil.Popen) -> tuple[psutil.Process, Planned] | None:
        """Wait for a job of a rule that is still to be killed; None once Snakemake has ended."""
        while snakemake.poll() is None:
            for process, job in self.running(snakemake):
                if job.rule in self.wanted():
                    return process, job
                tell(process, signal.SIGCONT)  # another job of its rule was killed
            time.sleep(POLL_S)
        return None

    def running(self, snakemake: psutil.Popen) -> Iterator[tuple[psutil.Process, Planned]]:
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in snakemake.children(recursive=True):
                if job := self.job_of(process):
                    yield process, job

    def wait(self, snakemake: psutil.Popen, process: psutil.Process, rule: str, seconds: float) -> bool:
        """Let a job work for some seconds while those of other rules to be killed stand still; whether it has ended."""
        tell(process, signal.SIGCONT)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for other, job in self.running(snakemake):
                if job.rule != rule and job.rule in self.wanted():
                    tell(other, signal.SIGSTOP)
            with contextlib.suppress(psutil.TimeoutExpired):
                process.wait(timeout=POLL_S)
                return True
        return False

    def job_of(self, process: psutil.Process) -> Planned | None:
        """Return the job that a process is, by the log that its errors go to."""
        with contextlib.suppress(OSError, ValueError):  # it has ended, or the log is none of ours
            log = Path(f"/proc/{process.pid}/fd/2").readlink()
            return self.jobs.get(log.relative_to(self.victim.directory.resolve()).as_posix())
        return None

    def attack(self, snakemake: psutil.Popen, process: psutil.Process, job: Planned) -> bool:
        """Kill a job at a random moment of its time. False where Snakemake has to be started again after it.

        The moments of a rule are spread: the i-th of n lies in the i-th n-th of the time. A job that ends before is
        made again: its outputs are removed.
        """
        number, began = self.hits[job.rule], time.monotonic()
        share = (number + self.chance.random()) / self.kills
        moment = share * self.lasted.get(job.rule, job.seconds)
        if self.wait(snakemake, process, job.rule, moment):
            self.lasted[job.rule] = time.monotonic() - began
            self.misses[job.rule] += 1
            self.kill_all(snakemake)
            for output in job.outputs:
                path = self.victim.directory / output
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            return False
        alone = self.hits.total() % 3 != 0
        if alone:
            process.kill()
            process.wait(timeout=60)
        else:
            self.kill_all(snakemake)
        self.hits[job.rule] += 1
        logger.info("%s killed %s after %.2f s", job.rule, "alone" if alone else "with Snakemake", moment)
        return alone

    @staticmethod
    def kill_all(snakemake: psutil.Popen) -> None:
        os.killpg(snakemake.pid, signal.SIGKILL)


@pytest.fixture
def undisturbed(smallest: Workflow, tiny_model: Path, tmp_path: Path) -> Workflow:
    """Return the finished workflow with what nobody else asks for: comparison, pruned candidates, pretraining."""
    shutil.copytree(smallest.directory, tmp_path / "undisturbed", symlinks=True)
    workflow = smallest_workflow(tmp_path / "undisturbed", tiny_model)
    workflow.run(*EVERYTHING, changes=CHANGES)
    return workflow


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_every_stage_killed(
    undisturbed: Workflow, tiny_model: Path, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    victim = smallest_workflow(tmp_path / "victim", tiny_model)
    kills = pytestconfig.getoption("--kills")
    killer = Killer(victim, planned_jobs(undisturbed), kills, random.Random(0))
    killer.walk()
    logger.info("hits: %s; ended before their moment: %s", dict(killer.hits), dict(killer.misses))
    assert set(killer.hits.values()) == {kills}
    assert victim.snakemake("--unlock", changes=CHANGES).returncode == 0
    victim.run("--rerun-incomplete", *killer.again(), *EVERYTHING, changes=CHANGES)
    assert_same_results(victim.directory / "results", undisturbed.directory / "results")
    assert [path for path in (victim.directory / "results").rglob("*") if LEFTOVER.search(path.name)] == []
    assert victim.plan(*EVERYTHING, changes=CHANGES) == []
