"""Test sets of given pairs and of LR images alone, from folders to the report, beside the smallest pipeline's run."""

import io
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
    "dataset_defaults": {"downscale": 2},
    "datasets": {
        "pairs": {
            "images": ["pairs/HR"],
            "lr": {"source": "given", "images": ["pairs/LR"]},
            "hr_size": 64,
            "crop": "center",
            "downscale": 1,
        },
        "alone": {"images": ["alone"], "lr": {"source": "alone"}, "crop": "full", "downscale": 1},
    },
    "run_defaults": {"tests": ["pairs", "alone"]},
    "runs": {"default": {"controls": []}},
}


@pytest.fixture(scope="module")
def results(smallest: Workflow, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("given") / "work"
    shutil.copytree(smallest.directory, folder, copy_function=shutil.copy2)
    photographs(folder)
    workflow = Workflow(folder, smallest.config_files)
    report = "results/runs/default/report/index.html"
    left = {rule for rule, _ in workflow.plan(report, changes=CHANGES)}
    assert left.isdisjoint({"train", "encode", "select_pairs"}), "a new test set trains nothing again"
    workflow.run(report, changes=CHANGES)
    return folder / "results"


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
