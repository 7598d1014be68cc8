"""`snakemake downstream`: its jobs, and what it says where there is nothing to do or a file is missing."""

from pathlib import Path
from typing import Any

import tiny_benchmarks as tiny
from workflow_rig import CONFIG, SMALLEST, Workflow, count, pick, rules


def changes(folder: Path, **task: Any) -> dict[str, Any]:
    """Return a config with a benchmark of text, whose model is a mere folder: enough for a plan."""
    images, annotations = tiny.icdar(folder / "icdar") if not (folder / "icdar").exists() else _found(folder)
    (folder / "model").mkdir(exist_ok=True)
    paths = {"images": str(images), "annotations": str(annotations), "model": str(folder / "model")}
    return {"downstream": {"icdar": {"kind": "text", **paths, **task}}}


def _found(folder: Path) -> tuple[Path, Path]:
    return folder / "icdar" / "images", folder / "icdar" / "gt"


def test_nothing_is_configured(tmp_path: Path) -> None:
    done = Workflow(tmp_path).snakemake("--dry-run", "downstream")
    assert done.returncode != 0 and "most recent call" not in done.stdout
    assert "config: downstream: no benchmark is named there, so there is nothing to do" in done.stdout


def test_jobs(tmp_path: Path) -> None:
    workflow = Workflow(tmp_path, [CONFIG, SMALLEST])
    jobs = workflow.plan("downstream", changes=changes(tmp_path, num_shards=2))
    own = {"lower_resolution": 2, "restore": 4, "predict": 8, "compare_downstream": 1}
    assert {rule: number for rule, number in count(jobs).items() if rule in own} == own
    assert {job["source"] for job in pick(jobs, "restore")} == {"base", "default"}
    assert {job["source"] for job in pick(jobs, "predict")} == {"hr", "lr", "base", "default"}
    assert "train" in rules(jobs) and "report" not in rules(jobs)
    assert not set(own) & rules(workflow.plan(changes=changes(tmp_path)))  # the report does not wait for it


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    done = Workflow(tmp_path).snakemake("--dry-run", changes=changes(tmp_path, annotations="absent"))
    assert done.returncode != 0 and "Traceback" not in done.stdout
    assert "config: downstream.icdar.annotations: 'absent' does not exist, wanted the annotations" in done.stdout
