"""Rewards against numbers worked out by hand."""

import json
import logging
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from dp2osr import tables
from dp2osr.config import RewardSettings
from dp2osr.errors import UserError
from dp2osr.preference import reward as core
from dp2osr.preference.columns import read_columns
from dp2osr.stages import reward as reward_stage

M4 = RewardSettings(fr=["ssim", "gmsd"], nr=["niqe"], weight_fr=0.5, num_rollouts=4)
M5 = M4.model_copy(update={"num_rollouts": 5})
# candidate            0     1    2     3      ssim: higher, gmsd and niqe: lower is better
SSIM, GMSD, NIQE = [0.2, 0.4, 0.6, 1.0], [4.0, 3.0, 2.0, 0.0], [5.0, 5.0, 1.0, 3.0]
FR, NR = [0.0, 0.25, 0.5, 1.0], [0.0, 0.0, 1.0, 0.5]


def long(group: str = "a", **metrics: list[float]) -> pd.DataFrame:
    rows = [
        (group, rollout, name, float(score), "ok" if np.isfinite(score) else "nan")
        for name, scores in metrics.items()
        for rollout, score in enumerate(scores)
    ]
    return pd.DataFrame(rows, columns=tables.SCORES.names).astype({"rollout": "int32"})


def test_by_hand() -> None:
    frame, scales = core.rewards(long(ssim=SSIM, gmsd=GMSD, niqe=NIQE, piqe=[1, 2, 3, 4]), M4)
    assert frame.columns.tolist() == tables.rewards_schema(["ssim", "gmsd", "niqe", "piqe"]).names
    np.testing.assert_allclose(frame["ssim__norm"], FR)
    np.testing.assert_allclose(frame["gmsd__norm"], FR)
    np.testing.assert_allclose(frame["niqe__norm"], NR)
    np.testing.assert_allclose(frame["reward"], [0, 0.125, 0.75, 0.75])
    assert frame["rank"].tolist() == [3, 2, 0, 1]  # a tie goes to the smaller rollout
    assert frame["gmsd"].tolist() == GMSD  # raw stays raw
    assert set(frame["status"]) == {"ok"}
    assert scales.set_index("metric").loc["gmsd", ["min", "max"]].tolist() == [0, 4]
    np.testing.assert_allclose(frame["piqe__norm"], [1, 2 / 3, 1 / 3, 0])  # held out: normalised, not in the reward


def test_sets_weigh_the_same_whatever_their_sizes() -> None:
    scores = long(ssim=[0, 1], gmsd=[1, 0], fsim=[0, 1], niqe=[0, 1])
    settings = RewardSettings(fr=["ssim", "gmsd", "fsim"], nr=["niqe"], weight_fr=0.5, num_rollouts=2)
    assert core.rewards(scores, settings)[0]["reward"].tolist() == [0.5, 0.5]
    assert core.rewards(scores, settings.model_copy(update={"weight_fr": 0.75}))[0]["reward"].tolist() == [0.25, 0.75]


@pytest.mark.parametrize(("fr", "nr", "wanted"), [(["ssim"], [], FR), ([], ["niqe"], NR)])
def test_an_empty_set_leaves_all_weight_to_the_other(fr: list[str], nr: list[str], wanted: list[float]) -> None:
    settings = RewardSettings(fr=fr, nr=nr, weight_fr=0.5, num_rollouts=4)
    frame, _ = core.rewards(long(ssim=SSIM, niqe=NIQE), settings)
    np.testing.assert_allclose(frame["reward"], wanted)
    assert frame["nr" if fr else "fr"].isna().all()


def test_both_sets_empty() -> None:
    with pytest.raises(UserError, match="both empty"):
        core.rewards(long(ssim=SSIM), RewardSettings(fr=[], nr=[], weight_fr=0.5, num_rollouts=4))


def test_constant_metric_favours_nobody() -> None:
    frame, scales = core.rewards(long(ssim=[0.7] * 4, gmsd=GMSD, niqe=NIQE), M4)
    assert frame["ssim__norm"].tolist() == [0.5] * 4
    np.testing.assert_allclose(frame["fr"], (0.5 + np.array(FR)) / 2)
    on_scale = core.apply_scale(frame.assign(ssim=0.9), scales, M4)
    assert on_scale["ssim__norm"].tolist() == [0.5] * 4


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_score_that_is_no_number(bad: float, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        frame, scales = core.rewards(long(ssim=[*SSIM, bad], gmsd=[*GMSD, 9.0], niqe=[*NIQE, 2.0]), M5)
    np.testing.assert_allclose(frame["ssim__norm"][:4], FR)  # the others' min and max do not move
    assert frame["reward"].isna().tolist() == [False] * 4 + [True]
    assert frame["rank"].tolist()[-1] == -1 and sorted(frame["rank"])[1:] == [0, 1, 2, 3]
    assert frame["status"].tolist() == ["ok"] * 4 + ["no number: ssim"]
    assert scales["max"].tolist() == [9.0, 5.0, 1.0]
    assert "1 of 5 candidates, in 1 of 1 groups: a" in caplog.text


def test_held_out_metric_without_a_number_leaves_the_reward() -> None:
    frame, _ = core.rewards(long(ssim=SSIM, gmsd=GMSD, niqe=NIQE, piqe=[np.nan, 2, 3, 4]), M4)
    assert frame["reward"].notna().all()
    assert frame["status"].tolist() == ["no number: piqe", "ok", "ok", "ok"]


def test_missing_candidates(caplog: pytest.LogCaptureFixture) -> None:
    scores = pd.concat([long(ssim=SSIM, gmsd=GMSD, niqe=NIQE), long("b", ssim=[0, 1], gmsd=[1, 0], niqe=[1, 0])])
    with caplog.at_level(logging.WARNING):
        frame, _ = core.rewards(scores, M4)
    assert len(frame) == 8
    lost = frame[(frame["group_id"] == "b") & (frame["rollout"] >= 2)]
    assert lost["status"].tolist() == ["missing candidate"] * 2
    assert lost["reward"].isna().all() and (lost["rank"] == -1).all()
    assert "missing candidate: 2 of 8 candidates, in 1 of 2 groups: b" in caplog.text


def test_only_the_first_m_rollouts_count() -> None:
    settings = M4.model_copy(update={"num_rollouts": 2})
    frame, scales = core.rewards(long(ssim=SSIM, gmsd=GMSD, niqe=[5, 4, 1, 3]), settings)
    assert frame["rollout"].tolist() == [0, 1]
    assert frame["reward"].tolist() == [0, 1]
    assert scales.set_index("metric").loc["ssim", "max"] == 0.4


def test_row_order_does_not_matter() -> None:
    rng = np.random.default_rng(0)
    groups = [long(name, ssim=rng.random(4), gmsd=rng.random(4), niqe=rng.random(4)) for name in "cab"]
    scores = pd.concat(groups, ignore_index=True)
    first, scales = core.rewards(scores, M4)
    again, scales_again = core.rewards(scores.sample(frac=1, random_state=1), M4)
    pd.testing.assert_frame_equal(first, again)
    pd.testing.assert_frame_equal(scales, scales_again)
    assert first["group_id"].tolist() == sorted(first["group_id"])
    for group in groups:  # a group's rewards do not depend on the others
        alone, _ = core.rewards(group, M4)
        same = first[first["group_id"] == group["group_id"].iloc[0]].reset_index(drop=True)
        pd.testing.assert_frame_equal(alone, same)


def test_wrong_tables() -> None:
    scores = long(ssim=SSIM, gmsd=GMSD, niqe=NIQE)
    with pytest.raises(UserError, match="1 of 13 rows repeat"):
        core.rewards(pd.concat([scores, scores[:1]]), M4)
    with pytest.raises(UserError, match="unknown metric 'sism'"):
        core.rewards(scores.replace("ssim", "sism"), M4)
    with pytest.raises(UserError, match="'niqe' has no scores"):
        core.rewards(scores[scores["metric"] != "niqe"], M4)
    with pytest.raises(UserError, match="no rows"):
        core.rewards(scores[:0], M4)
    with pytest.raises(UserError, match="no candidate has a finite score"):
        core.rewards(long(ssim=[np.nan] * 4, gmsd=GMSD, niqe=NIQE), M4)


def test_apply_scale() -> None:
    """The reference on its own scale has its own rewards; another policy may leave [0, 1]."""
    scores = pd.concat([long(ssim=SSIM, gmsd=GMSD, niqe=NIQE), long("b", ssim=GMSD, gmsd=SSIM, niqe=FR)])
    frame, scales = core.rewards(scores, M4)
    same = core.apply_scale(frame, scales, M4)
    pd.testing.assert_frame_equal(same, frame[same.columns])
    shuffled = core.apply_scale(frame[::-1], scales[::-1], M4)
    assert shuffled["reward"].tolist() == same["reward"].tolist()[::-1]
    other = core.widen(long(ssim=[1.8, -0.6], gmsd=[-4, 8], niqe=[-3, np.nan]))
    on_scale = core.apply_scale(other, scales, M4)
    np.testing.assert_allclose(on_scale["fr"], [2, -1])
    np.testing.assert_allclose(on_scale["reward"], [2, np.nan])
    with pytest.raises(UserError, match="no row for group 'c'"):
        core.apply_scale(core.widen(long("c", ssim=SSIM, gmsd=GMSD, niqe=NIQE)), scales, M4)
    with pytest.raises(UserError, match="'niqe' has no scores"):
        core.apply_scale(frame, scales[scales["metric"] != "niqe"], M4)


def test_widen_keeps_the_candidates_there_are() -> None:
    wide = core.widen(pd.concat([long("b", ssim=[1], psnr=[3]), long("a", ssim=[2, 4])]))
    assert wide["group_id"].tolist() == ["a", "a", "b"] and wide["rollout"].tolist() == [0, 1, 0]
    assert wide["ssim"].tolist() == [2, 4, 1]
    np.testing.assert_array_equal(wide["psnr"], [np.nan, np.nan, 3])


def test_stage(tmp_path: Path) -> None:
    """Any cut into shards, blocks and metric groups gives the same bytes."""
    rng = np.random.default_rng(1)
    data = [long(name, ssim=rng.random(4), gmsd=rng.random(4), niqe=rng.random(4)) for name in "abcd"]
    scores = pd.concat(data, ignore_index=True)

    def run(name: str, shard_of: dict[str, str], rollouts_per_block: int) -> tuple[bytes, bytes]:
        folder = tmp_path / name
        group = scores["metric"].map({"ssim": "fr", "gmsd": "fr", "niqe": "nr"})
        block = (scores["rollout"] // rollouts_per_block).map("{:03d}".format)
        for (kind, shard, part), rows in scores.groupby([group, scores["group_id"].map(shard_of), block]):
            tables.write(rows, folder / kind / f"shard-{shard}.block-{part}.parquet", tables.SCORES)
        job = {
            "reward": M4.model_dump(),
            "num_candidates": 4,
            "groups": ["fr", "nr"],
            "shards": sorted(set(shard_of.values())),
            "blocks": sorted(set(block)),
        }
        paths = folder / "rewards.parquet", folder / "scales.parquet"
        options = ["--scores", str(folder), "--rewards", str(paths[0]), "--scales", str(paths[1])]
        reward_stage.main([*options, "--config", json.dumps(job)])
        return paths[0].read_bytes(), paths[1].read_bytes()

    one = run("one", dict.fromkeys("abcd", "0000"), 4)
    many = run("many", {"a": "0001", "b": "0000", "c": "0001", "d": "0000"}, 2)
    assert one == many
    frame = tables.read_rewards(tmp_path / "one" / "rewards.parquet")
    pd.testing.assert_frame_equal(frame, core.rewards(scores, M4)[0], check_dtype=False)
    assert len(tables.read(tmp_path / "one" / "scales.parquet", tables.SCALES)) == 12


def test_what_made_the_scores_is_carried_on_and_must_be_one(tmp_path: Path) -> None:
    made = {"ssim": "pyiqa 1, score 1", "gmsd": "pyiqa 1, score 1"}
    for shard, group in (("0000", "a"), ("0001", "b")):
        path = tmp_path / "fr" / f"shard-{shard}.block-000.parquet"
        tables.write(long(group, ssim=SSIM, gmsd=GMSD), path, tables.SCORES, origins=made)
    settings = {"fr": ["ssim", "gmsd"], "nr": [], "weight_fr": 0.5, "num_rollouts": 4}
    job = {"reward": settings, "num_candidates": 4, "groups": ["fr"], "shards": ["0000", "0001"], "blocks": ["000"]}
    rewards, scales = tmp_path / "rewards.parquet", tmp_path / "scales.parquet"
    options = ["--scores", str(tmp_path), "--rewards", str(rewards), "--scales", str(scales)]
    reward_stage.main([*options, "--config", json.dumps(job)])
    assert tables.read_origins(rewards) == tables.read_origins(scales) == made
    tables.write(long("b", ssim=SSIM, gmsd=GMSD), path, tables.SCORES, origins=made | {"gmsd": "pyiqa 2, score 1"})
    rewards.unlink()
    with pytest.raises(UserError, match=r"shard-0001.*'gmsd' is by pyiqa 2, score 1; other tables by pyiqa 1, score 1"):
        reward_stage.main([*options, "--config", json.dumps(job)])
    assert not rewards.exists()
    tables.write(long("b", ssim=SSIM, gmsd=GMSD), path, tables.SCORES)  # of a time before this was noted
    reward_stage.main([*options, "--config", json.dumps(job)])


def test_read_columns_checks_the_file(tmp_path: Path) -> None:
    frame, scales = core.rewards(long(ssim=SSIM, gmsd=GMSD, niqe=NIQE), M4)
    tables.write(frame, tmp_path / "r.parquet", tables.rewards_schema(["ssim", "gmsd", "niqe"]))
    tables.write(scales, tmp_path / "s.parquet", tables.SCALES)
    assert read_columns(tmp_path / "r.parquet", ["rollout"]).column_names == ["rollout"]
    with pytest.raises(UserError, match="column 'rollout' is missing"):
        read_columns(tmp_path / "s.parquet", ["rollout"])
    with pytest.raises(UserError, match="unknown column"):
        read_columns(tmp_path / "r.parquet", ["group_id"], schema=tables.SCORES.remove(4).remove(3).remove(2))
    (tmp_path / "t.parquet").write_bytes((tmp_path / "s.parquet").read_bytes()[:100])
    with pytest.raises(UserError, match=r"t.parquet: no readable parquet"):
        read_columns(tmp_path / "t.parquet", ["metric"])
    with pytest.raises(UserError, match="not found"):
        read_columns(tmp_path / "none.parquet", ["metric"])
