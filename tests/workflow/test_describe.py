"""Prompts from LR images in the workflow: a rule of their own, with the models as inputs."""

import os
from pathlib import Path
from typing import Any

from workflow_rig import Workflow, count, pick, rules


def overlay(**tags: str) -> dict[str, Any]:
    return {"datasets": {"train": {"prompt": {"source": "tags", "tags": tags}}}}


def files(folder: Path) -> dict[str, str]:
    found = {name: str(folder / name) for name in ("ram", "dape", "tag_list")}
    for path in found.values():
        Path(path).write_text(path)
    return found


def test_images_are_described_where_a_data_set_wants_it(tmp_path: Path) -> None:
    workflow = Workflow(tmp_path)
    before = workflow.plan("policy")
    assert "describe" not in rules(before)
    jobs = workflow.plan("policy", changes=overlay(**files(tmp_path)))
    assert count(jobs)["describe"] == 1
    assert [job["dataset"] for job in pick(jobs, "describe")] == ["train"]
    assert "train" not in [job["dataset"] for job in pick(jobs, "prompt")]
    assert {job for job in jobs if job[0] != "describe"} == {job for job in before if job not in train_prompts(before)}


def train_prompts(jobs: list[tuple[str, str]]) -> list[tuple[str, str]]:
    return [job for job in jobs if job[0] == "prompt" and "dataset=train" in job[1]]


def test_newer_weights_make_new_prompts(tmp_path: Path) -> None:
    changes = overlay(**files(tmp_path))
    workflow = Workflow(tmp_path)
    prompt = "results/train/prompts/shard-0000.parquet"
    for name in ("results/train/images.parquet", "results/train/lr/shard-0000.tar", prompt):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert workflow.snakemake("--touch", "--cores", "1", prompt, changes=changes).returncode == 0
    assert "describe" not in rules(workflow.plan(prompt, "--rerun-triggers", "mtime", changes=changes))
    later = (tmp_path / prompt).stat().st_mtime + 60
    os.utime(tmp_path / "dape", (later, later))
    assert rules(workflow.plan(prompt, "--rerun-triggers", "mtime", changes=changes)) == {"describe"}


def test_a_missing_model_is_one_line(tmp_path: Path) -> None:
    wanted = files(tmp_path) | {"dape": "absent.pth"}
    done = Workflow(tmp_path).snakemake("--dry-run", changes=overlay(**wanted))
    assert done.returncode == 1
    assert "config: datasets.train.prompt.tags.dape: 'absent.pth' does not exist, wanted DAPE's weights" in done.stdout
    assert "Traceback" not in done.stdout
