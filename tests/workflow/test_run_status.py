"""`dp2osr status` knows the files of every job as the rules name them, and reads a run that was really made."""

import re
from pathlib import Path

import pytest

from dp2osr import config, status, status_files, status_jobs
from workflow_rig import CONFIG, ROOT, TARGETS, Workflow


def named_files(text: str) -> set[tuple[str, str, str, str]]:
    """Return rule, outputs, log and benchmark of each job in the output of a dry run."""
    found = set()
    for block in re.split(r"^(?=(?:local)?rule \w+:$)", text, flags=re.MULTILINE)[1:]:
        rule = block[: block.index(":")].removeprefix("local").removeprefix("rule ")
        if rule not in TARGETS:
            lines = (re.search(rf"^ {{4}}{key}: (.*)$", block, re.MULTILINE) for key in ("output", "log", "benchmark"))
            output, log, benchmark = (line[1] if line else "" for line in lines)
            found.add((rule, output, log, benchmark))
    return found


@pytest.mark.parametrize("overlays", [(), ("study.yaml",)], ids=["default", "study"])
def test_the_files_of_a_dry_run(overlays: tuple[str, ...], tmp_path: Path) -> None:
    files = [CONFIG, *(ROOT / "config" / name for name in overlays)]
    settings = config.read(*files)
    done = Workflow(tmp_path, files).snakemake("--dry-run")
    assert done.returncode == 0, done.stdout[-3000:]
    wanted = named_files(done.stdout)
    planned = status_jobs.planned(settings).values()
    assert len(wanted) == len(planned)
    for job in planned:
        log, benchmark = (f"{settings.results}/{path}" for path in (job.log, job.benchmark))
        match = [output for rule, output, *rest in wanted if (rule, *rest) == (job.stage, log, benchmark)]
        assert len(match) == 1 and f"{settings.results}/{job.output}" in match[0].split(", "), job


def test_a_finished_run(smallest: Workflow) -> None:
    settings = config.read(*smallest.config_files)
    results = smallest.directory / settings.results
    now = results.stat().st_mtime + 3600
    found = status_files.look(results, settings, plan_of="smallest", now=now, stale_s=900)
    assert {state.state for state in found.states} == {"done"} and not found.notes
    assert all(state.seconds for state in found.states)
    on_device = [state for state in found.states if state.job.stage in ("rollout", "score", "encode", "train", "embed")]
    assert {state.gpus for state in on_device} == {0}
    rows = {row.stage: row for row in found.rows}
    assert rows["rollout"].images and rows["rollout"].rate and rows["rollout"].work_s == 0
    for stage in ("degrade", "niqe", "embed", "rollout", "score", "reward", "encode", "train"):
        logs = [results / state.job.log for state in found.states if state.job.stage == stage]
        for path in logs:
            progress = status.find_progress(path.read_text())
            assert progress is not None and progress.rate is not None and progress.done == progress.total, path
            assert "\r" not in path.read_text() and "\x1b" not in path.read_text()
