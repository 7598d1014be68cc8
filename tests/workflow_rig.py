"""Snakemake as a test runs it: the repository's Snakefile in a folder of its own, and what a dry run says."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from dp2osr import tables

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "config" / "config.yaml"
SMALLEST = ROOT / "tests" / "data" / "smallest.yaml"
# 30,000 images, M = 64: 300 shards of 100 images, blocks of 16 seeds.
FULL_SCALE: dict[str, Any] = {
    "datasets": {"train": {"images": ["data/photographs"], "crops_per_image": 1, "num_shards": 300}},
    "rewards": {"default": {"num_rollouts": 64}},
    "rollout": {"rollouts_per_block": 16},
}
CORES = len(os.sched_getaffinity(0))
TARGETS = frozenset(
    {"all", "rollouts", "rewards", "pairs", "policy", "evaluation", "figures", "explorer", "downstream", "prune"}
)

# What a run may write differently each time: wall clock, and what names the machine or the moment.
VOLATILE = re.compile(
    r"^(logs|benchmarks)/|/(report|checkpoints)/|^report/.*\.html$|/policy\.json$|/train_log\.parquet$"
)

Job = tuple[str, str]  # rule, and its wildcards as "block=000, dataset=train"


@dataclass
class Workflow:
    """A working directory and the config files that Snakemake merges there, the later over the earlier."""

    directory: Path
    config_files: list[Path] = field(default_factory=lambda: [CONFIG])

    def snakemake(
        self, *arguments: str, changes: dict[str, Any] | None = None, python: tuple[str, ...] = (), timeout: int = 900
    ) -> subprocess.CompletedProcess[str]:
        """Run Snakemake with `changes` laid over the config; stdout holds its errors and messages too."""
        command, environment = self.command(*arguments, changes=changes, python=python)
        return subprocess.run(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
            check=False,
        )

    def command(
        self, *arguments: str, changes: dict[str, Any] | None = None, python: tuple[str, ...] = ()
    ) -> tuple[list[str], dict[str, str]]:
        """Return the command line of Snakemake and its environment."""
        self.directory.mkdir(parents=True, exist_ok=True)
        files = list(self.config_files)
        if changes:
            files.append(self.directory / f"changes-{os.getpid()}.json")  # two workers may ask at once
            files[-1].write_text(json.dumps(changes))
        command = [sys.executable, *python, "-m", "snakemake", "--snakefile", ROOT / "Snakefile"]
        command += ["--directory", self.directory, "--configfile", *files, "--nocolor", *arguments]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(self.directory / ".cache")}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)  # else each job compiles two thousand modules
        return [str(part) for part in command], environment

    def run(self, *targets: str, changes: dict[str, Any] | None = None, cores: int = CORES) -> None:
        """Make the targets; on failure, raise with Snakemake's output and the log of the job that failed."""
        done = self.snakemake("--cores", str(cores), "--show-failed-logs", *targets, changes=changes)
        if done.returncode:
            raise RuntimeError(f"snakemake failed in {self.directory}:\n{done.stdout[-6000:]}")

    def plan(self, *targets: str, changes: dict[str, Any] | None = None) -> list[Job]:
        """Return the jobs that a dry run lists, without the targets that only have names."""
        done = self.snakemake("--dry-run", *targets, changes=changes)
        if done.returncode:
            raise RuntimeError(f"dry run failed in {self.directory}:\n{done.stdout[-6000:]}")
        jobs = parse_jobs(done.stdout)
        if not jobs and "Nothing to be done" not in done.stdout:
            raise RuntimeError(f"no job and no 'Nothing to be done' in:\n{done.stdout[-6000:]}")
        return jobs


def parse_jobs(text: str) -> list[Job]:
    """Return rule and wildcards of each job in the output of a dry run."""
    jobs: list[Job] = []
    for block in re.split(r"^(?=(?:local)?rule \w+:$)", text, flags=re.MULTILINE)[1:]:
        rule = block[: block.index(":")].removeprefix("local").removeprefix("rule ")
        wildcards = re.search(r"^ {4}wildcards: (.*)$", block, re.MULTILINE)
        if rule not in TARGETS:
            jobs.append((rule, ", ".join(sorted(wildcards[1].split(", "))) if wildcards else ""))
    return jobs


def declared(text: str) -> dict[str, list[str]]:
    """Return the files of all jobs in the output of a dry run, as output, log and benchmark."""
    found: dict[str, list[str]] = {"output": [], "log": [], "benchmark": []}
    for kind, paths in re.findall(r"^ {4}(output|log|benchmark): (.*)$", text, re.MULTILINE):
        found[kind] += paths.split(", ")
    return found


def rules(jobs: list[Job]) -> set[str]:
    """Return the names of the rules of some jobs."""
    return {rule for rule, _ in jobs}


def count(jobs: list[Job]) -> Counter[str]:
    """Return how many jobs each rule has."""
    return Counter(rule for rule, _ in jobs)


def pick(jobs: list[Job], rule: str, **wildcards: str) -> list[dict[str, str]]:
    """Return the wildcards of each job of `rule` that agrees with `wildcards`."""
    found = [dict(part.split("=", 1) for part in text.split(", ")) for name, text in jobs if name == rule]
    return [each for each in found if wildcards.items() <= each.items()]


def smallest(directory: Path, model: Path) -> Workflow:
    """Return the workflow of tests/data/smallest.yaml on the model in `model` (tests/tiny.py)."""
    directory.mkdir(parents=True, exist_ok=True)
    overlay = directory / "model.json"
    text = json.dumps({"policy_defaults": {"model": str(model), "control": str(model / "controlnet")}})
    if not overlay.exists() or overlay.read_text() != text:  # another worker may be reading it
        overlay.write_text(text)
    return Workflow(directory, [CONFIG, SMALLEST, overlay])


def stable_files(results: Path) -> dict[str, Path]:
    """Return the files that two equal runs write byte for byte, by their path below the results."""
    files = {path.relative_to(results).as_posix(): path for path in results.rglob("*") if path.is_file()}
    return {name: path for name, path in files.items() if not VOLATILE.search(name)}


def assert_same_results(found: Path, wanted: Path) -> None:
    """Check that two results folders hold the same files, byte for byte; the training log but for its rate."""
    ours, theirs = stable_files(found), stable_files(wanted)
    assert set(ours) == set(theirs) and any(name.endswith(".safetensors") for name in theirs)
    assert [name for name, path in theirs.items() if ours[name].read_bytes() != path.read_bytes()] == []
    left, right = (
        tables.read(folder / "runs/default/train_log.parquet", tables.TRAIN_LOG).drop(columns="pairs_per_second")
        for folder in (found, wanted)
    )
    pd.testing.assert_frame_equal(left, right, check_exact=True)
