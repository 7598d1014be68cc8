"""Test sets of given pairs and of LR images alone, from folders to the report, beside the smallest pipeline's run."""

import importlib
import io
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from dp2osr import tables
from dp2osr.shards import read_shard
from workflow_rig import Workflow
from workflow_rig import smallest as smallest_workflow

SIZES = {"a": (16, 16), "b": (21, 18)}  # LR pixels


def photographs(folder: Path) -> None:
    """Write pairs below pairs/HR and pairs/LR, and the LR images again below alone/; one pair's LR file is cut off."""
    for name in ("pairs/HR", "pairs/LR", "alone"):
        (folder / name).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, (width, height) in SIZES.items():
        lr = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        lr.resize((4 * width, 4 * height), Image.Resampling.BICUBIC).save(folder / "pairs" / "HR" / f"{name}_HR.png")
        lr.save(folder / "pairs" / "LR" / f"{name}_LR4.png")
        lr.save(folder / "alone" / f"{name}.png")
    shutil.copy(folder / "pairs" / "HR" / "a_HR.png", folder / "cut.png")
    Image.new("RGB", (64, 64), "red").save(folder / "pairs" / "HR" / "cut_HR.png")
    (folder / "pairs" / "LR" / "cut_LR4.png").write_bytes((folder / "cut.png").read_bytes()[:200])


CHANGES: dict[str, Any] = {
    "datasets": {
        "train": {"images": ["builtin:dead-leaves/1000..1001"], "crops_per_image": 1},
        "pairs": {
            "images": ["pairs/HR"],
            "lr": {"source": "given", "images": ["pairs/LR"]},
            "hr_size": 64,
            "crop": "center",
            "downscale": 1,
        },
        "alone": {"images": ["alone"], "lr": {"source": "alone"}, "crop": "full", "downscale": 1},
    },
    "run_defaults": {"tests": ["pairs", "alone"], "train": {"steps": 1, "guard": {"every": 0}}},
    "runs": {"default": {"controls": []}},
}


def commands(workflow: Workflow, target: str) -> list[tuple[str, list[str]]]:
    """Return stage and arguments of each job that a dry run lists, in an order in which they can run."""
    done = workflow.snakemake("--dry-run", "--printshellcmds", target, changes=CHANGES)
    assert done.returncode == 0, done.stdout[-3000:]
    lines = [shlex.split(line) for line in done.stdout.splitlines() if " -m dp2osr.stages." in line]
    lines = [words[words.index("-m") + 1 : words.index("2>")] for words in lines]
    return [(words[0], words[1:]) for words in lines]


@pytest.fixture(scope="module")
def results(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run the jobs of the smallest pipeline with the two test sets, all in this process: starting one takes seconds."""
    workflow = smallest_workflow(tmp_path_factory.mktemp("given"), tiny_model)
    photographs(workflow.directory)
    with pytest.MonkeyPatch.context() as patch:
        jobs = commands(workflow, "results/runs/default/report/index.html")
        patch.chdir(workflow.directory)
        for stage, arguments in jobs:
            importlib.import_module(stage).main(arguments)
    return workflow.directory / "results"


def test_a_broken_pair_is_a_row_and_no_sample(results: Path) -> None:
    images = tables.read(results / "pairs" / "images.parquet", tables.IMAGES).set_index("source")
    assert images["status"].value_counts().to_dict() == {"ok": 2, "partner": 2, "rejected": 2}
    assert images.loc["pairs/HR/cut_HR.png", "reason"].startswith("its LR file pairs/LR/cut_LR4.png: unreadable")
    assert len(dict(read_shard(results / "pairs" / "lr" / "shard-0000.tar"))) == 2


def test_pairs_are_judged_with_their_originals(results: Path) -> None:
    rewards = tables.read_rewards(results / "pairs" / "default" / "rewards" / "default.parquet")
    assert {"gmsd", "niqe", "psnr"} <= set(rewards.columns) and rewards["fr"].notna().all()


def test_lr_alone_is_judged_without_reference(results: Path) -> None:
    scores = tables.read(
        results / "alone" / "default" / "scores" / "light" / "shard-0000.block-000.parquet", tables.SCORES
    )
    assert set(scores["metric"]) == {"niqe"} and (scores["status"] == "ok").all()
    rewards = tables.read_rewards(results / "alone" / "default" / "rewards" / "default.parquet")
    assert rewards["fr"].isna().all() and (rewards["status"] == "ok").all()
    pd.testing.assert_series_equal(rewards["reward"], rewards["niqe__norm"], check_names=False)
    evaluation = tables.read(results / "runs" / "default" / "evaluation" / "alone.parquet", tables.EVALUATION)
    assert "fr" not in set(evaluation["statistic"]) and {"nr", "niqe", "mean_at_m"} <= set(evaluation["statistic"])
    assert evaluation[["value", "reference", "difference"]].notna().all(axis=None)


def test_whole_images_keep_their_sizes(results: Path) -> None:
    found = set()
    for _, fields in read_shard(results / "alone" / "default" / "candidates" / "shard-0000.block-000.tar"):
        with Image.open(io.BytesIO(fields["png"])) as image:
            found.add(image.size)
    assert found == {(4 * width, 4 * height) for width, height in SIZES.values()}


def test_report_says_that_there_is_no_original(results: Path) -> None:
    page = (results / "runs" / "default" / "report" / "index.html").read_text()
    assert "alone has no originals" in page and "pairs has no originals" not in page
    assert "there is no original" in page and "nan" not in page.split("</style>")[1].lower().split("base64")[0]
