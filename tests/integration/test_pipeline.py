"""The smallest pipeline, from images to report: its tables, and the same in other shards.

That it gives the same bytes elsewhere is seen where it is killed meanwhile (tests/workflow/test_kill.py).
"""

import json
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import pytest

from dp2osr import config, tables
from dp2osr.shards import read_shard
from workflow_rig import CONFIG, SMALLEST, Workflow
from workflow_rig import smallest as smallest_workflow

SCHEMAS = {
    "*/images.parquet": tables.IMAGES,
    "*/prompts/*.parquet": tables.PROMPTS,
    "*/*/scores/*/*.parquet": tables.SCORES,
    "*/*/scales/*.parquet": tables.SCALES,
    "runs/*/pairs.parquet": tables.PAIRS,
    "runs/*/train_log.parquet": tables.TRAIN_LOG,
    "runs/*/validation.parquet": tables.VALIDATION,
    "runs/*/evaluation/*.parquet": tables.EVALUATION,
}
M, N, GROUPS = 4, 1, 4


@pytest.fixture(scope="module")
def results(smallest: Workflow) -> Path:
    return smallest.directory / "results"


def candidates(results: Path) -> dict[str, dict[str, bytes]]:
    """Return the reference's candidates of the training set, whatever shards and blocks they lie in."""
    found: dict[str, dict[str, bytes]] = {}
    for path in sorted((results / "train" / "base" / "candidates").glob("*.tar")):
        found |= dict(read_shard(path))
    return found


def test_each_table_has_its_schema(results: Path) -> None:
    matched = {path: schema for pattern, schema in SCHEMAS.items() for path in results.glob(pattern)}
    rewards = {path: None for path in results.glob("*/*/rewards/*.parquet")}
    assert set(matched) | set(rewards) == set(results.rglob("*.parquet"))
    assert len({id(schema) for schema in matched.values()}) == len(SCHEMAS)
    for path, schema in matched.items():
        frame = tables.read(path, schema)
        keys = tables.keys(schema)
        assert len(frame) and not frame.duplicated(keys).any(), path
        pd.testing.assert_frame_equal(frame, frame.sort_values(keys, kind="stable", ignore_index=True))
        assert all(field.metadata[b"description"] for field in pq.read_schema(path)), path
    for path in rewards:
        assert len(tables.read_rewards(path)), path


def test_rewards_and_ranks(results: Path) -> None:
    frame = tables.read_rewards(results / "train" / "base" / "rewards" / "default.parquet")
    assert len(frame) == GROUPS * M and (frame["status"] == "ok").all()
    normalised = frame[["gmsd__norm", "niqe__norm", "fr", "nr", "reward"]]
    assert normalised.min().min() >= 0 and normalised.max().max() <= 1
    assert frame["reward"].to_numpy() == pytest.approx((frame["fr"] + frame["nr"]).to_numpy() / 2)
    for _, group in frame.groupby("group_id"):
        assert sorted(group["rank"]) == list(range(M))
        assert group.sort_values("rank")["reward"].is_monotonic_decreasing
        assert group["gmsd__norm"].idxmax() == group["gmsd"].idxmin()  # lower is better
        assert group["gmsd"].nunique() > 1  # another seed, another image
    scales = tables.read(results / "train" / "base" / "scales" / "default.parquet", tables.SCALES)
    wanted = frame.groupby("group_id")["niqe"].agg(["min", "max"])
    found = scales[scales["metric"] == "niqe"].set_index("group_id")[["min", "max"]]
    pd.testing.assert_frame_equal(found, wanted, check_names=False)


def test_pairs_are_the_best_against_the_worst(results: Path) -> None:
    frame = tables.read_rewards(results / "train" / "base" / "rewards" / "default.parquet")
    pairs = tables.read(results / "runs" / "default" / "pairs.parquet", tables.PAIRS)
    assert len(pairs) == GROUPS * N**2 and pairs["weight"].mean() == pytest.approx(1, abs=0.2)
    rank = frame.set_index(["group_id", "rollout"])["rank"]
    for pair in pairs.itertuples():
        assert rank[pair.group_id, pair.chosen] == 0 and rank[pair.group_id, pair.rejected] == M - 1


def test_training_begins_at_the_reference_and_ends_as_a_policy(results: Path, tiny_model: Path) -> None:
    run = results / "runs" / "default"
    settings = config.read(CONFIG, SMALLEST).runs["default"].train
    log = tables.read(run / "train_log.parquet", tables.TRAIN_LOG)
    assert log["step"].tolist() == list(range(1, settings.steps + 1)) and log["abs_logit"].iloc[0] == 0
    validation = tables.read(run / "validation.parquet", tables.VALIDATION)
    assert validation["step"].tolist() == list(range(0, settings.steps + 1, settings.guard.every))
    assert (validation["verdict"] == "ok").all()
    wanted = json.loads((tiny_model / "controlnet" / "config.json").read_text())
    found = json.loads((run / "policy" / "config.json").read_text())
    assert found["block_out_channels"] == wanted["block_out_channels"]


def test_report_names_the_intervals(results: Path) -> None:
    evaluation = tables.read(results / "runs" / "default" / "evaluation" / "holdout.parquet", tables.EVALUATION)
    assert {"default", "base", "bicubic"} <= set(evaluation["policy"])
    tuned = evaluation[(evaluation["policy"] == "default") & (evaluation["statistic"] == "mean_at_m")]
    assert (tuned["ci_low"] <= tuned["difference"]).all() and (tuned["difference"] <= tuned["ci_high"]).all()
    page = (results / "runs" / "default" / "report" / "index.html").read_text()
    assert "95 %" in page and "interval" in page and "holdout" in page
    assert not re.search(r'(src|href)="(https?:)?//', page)


@pytest.mark.slow
def test_four_shards_equal_one(results: Path, tiny_model: Path, tmp_path: Path) -> None:
    overlay: dict[str, Any] = {"datasets": {"train": {"num_shards": GROUPS}}}
    split = smallest_workflow(tmp_path, tiny_model)
    split.run("pairs", changes=overlay)
    sharded = split.directory / "results"
    assert len(list((sharded / "train" / "base" / "candidates").glob("*.tar"))) == GROUPS
    assert candidates(sharded) == candidates(results)
    found, wanted = (
        tables.read(each / "runs" / "default" / "pairs.parquet", tables.PAIRS) for each in (sharded, results)
    )
    pd.testing.assert_frame_equal(found, wanted, check_exact=False, rtol=1e-5)
