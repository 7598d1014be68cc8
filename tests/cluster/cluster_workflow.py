"""The workflow as a user of a cluster runs it: Snakemake on the login node, with the profile, jobs through SLURM."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

import workflow_rig
from slurm_rig import Slurm
from workflow_rig import ROOT, Workflow

PROFILE = ROOT / "config" / "profiles" / "slurm"
FASTPOLL = Path(__file__).with_name("fastpoll.py")
# What a private SLURM on one machine needs no more of than this.
QUICK = ["--latency-wait", "5", "--slurm-init-seconds-before-status-checks", "1", "--slurm-keep-successful-logs"]
AUTO = {"device": "auto"}  # so that jobs ask for a GPU; torch sees none behind the stand-ins and takes the CPU


@dataclass
class ClusterWorkflow(Workflow):
    """A working directory whose jobs go through a private SLURM."""

    slurm: Slurm = field(kw_only=True)
    snakefile: Path = ROOT / "Snakefile"

    @property
    def log(self) -> Path:
        """Where Snakemake's output goes."""
        return self.directory / "driver.log"

    def command(
        self, *arguments: str, changes: dict[str, Any] | None = None, python: tuple[str, ...] = ()
    ) -> tuple[list[str], dict[str, str]]:
        """Return the command line with the profile, and the environment of a client of the private SLURM."""
        command, environment = super().command("--profile", str(PROFILE), *QUICK, *arguments, changes=changes)
        at = command.index("-m")
        command[at : at + 2] = [str(FASTPOLL)]
        command[command.index("--snakefile") + 1] = str(self.snakefile)
        return command, environment | {name: self.slurm.environment[name] for name in ("SLURM_CONF", "PATH")}

    @contextlib.contextmanager
    def driver(self, *arguments: str, changes: dict[str, Any] | None = None) -> Iterator[psutil.Popen]:
        """Start Snakemake in its folder; in the end it gets SIGKILL, should it still run."""
        command, environment = self.command(*arguments, changes=AUTO | (changes or {}))
        with self.log.open("ab") as log:
            process = psutil.Popen(
                command,
                cwd=self.directory,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(timeout=20)

    def finish(self, driver: psutil.Popen, timeout: float) -> str:
        """Wait until Snakemake ends well; return all that it said."""
        try:
            code = driver.wait(timeout=timeout)
        except psutil.TimeoutExpired:
            code = f"still running after {timeout} s"
        text = self.log.read_text()
        assert code == 0, f"Snakemake: {code}\n{text[-6000:]}\n{self.queue()}"
        return text

    def queue(self) -> str:
        """Return all jobs of the private SLURM, ended ones too."""
        return self.slurm.client("squeue", "--states=all", "-o", "%A %T %N %r %k")

    def assert_left_clean(self) -> None:
        """Check that nothing of the run is in the queue, and that no lock is left."""
        assert self.slurm.jobs() == []
        assert list((self.directory / ".snakemake" / "locks").glob("*")) == []

    def payload(self, output: str) -> psutil.Process | None:
        """Return the stage that makes `output`, once it runs."""
        return next(self.payloads(output), None)

    def payloads(self, output: str) -> Iterator[psutil.Process]:
        """Yield the processes of the stage that makes `output`, on all nodes: of a training launchers, too."""
        for process in self.slurm.processes():
            with contextlib.suppress(psutil.Error):
                line = process.cmdline()
                here = process.cwd() == str(self.directory.resolve())
                runs = line[:2] == [sys.executable, "-m"] or line[1:2] == ["-m"]
                if here and runs and output in line:
                    yield process


def smallest(directory: Path, model: Path, slurm: Slurm) -> ClusterWorkflow:
    """Return the workflow of tests/data/smallest.yaml on the model in `model`, to be run through `slurm`."""
    local = workflow_rig.smallest(directory, model)
    return ClusterWorkflow(directory, local.config_files, slurm=slurm)
