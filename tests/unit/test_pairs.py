"""Pairs and HPO weights against numbers worked out by hand."""

import json
import logging
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from dp2osr import tables
from dp2osr.config import PairSettings, RewardSettings
from dp2osr.errors import UserError
from dp2osr.preference import reward as reward_core
from dp2osr.preference.pairs import select_pairs
from dp2osr.stages import pairs as pairs_stage

TOP2 = PairSettings(selection="reward", top=2, min_gap=0, max_pairs_per_group=0, weights="both")
NAMES = ["chosen", "rejected"]


def frame(**groups: list[float]) -> pd.DataFrame:
    rows = [(name, rollout, reward) for name, rewards in groups.items() for rollout, reward in enumerate(rewards)]
    return pd.DataFrame(rows, columns=["group_id", "rollout", "reward"])


def many(num_groups: int = 20, num_rollouts: int = 12) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    return frame(**{f"g{number:02d}": rng.random(num_rollouts).tolist() for number in range(num_groups)})


def change(**values: object) -> PairSettings:
    return TOP2.model_copy(update=values)


def test_by_hand() -> None:
    pairs = select_pairs(frame(a=[0.1, 0.9, 0.5, 0.7, 0.3]), TOP2, seed=0)
    assert pairs.columns.tolist() == tables.PAIRS.names
    assert pairs[NAMES].to_numpy().tolist() == [[1, 0], [1, 4], [3, 0], [3, 4]]
    gaps = np.array([0.8, 0.6, 0.6, 0.4])
    np.testing.assert_allclose(pairs["gap"], gaps)
    np.testing.assert_allclose(pairs["w_intra"], gaps + 0.4)  # 1 - mean gap of 0.6
    np.testing.assert_allclose(pairs["w_inter"], 1)  # one group
    np.testing.assert_allclose(pairs["reward_chosen"], [0.9, 0.9, 0.7, 0.7])
    np.testing.assert_allclose(pairs["reward_rejected"], [0.1, 0.3, 0.1, 0.3])


def test_w_inter_by_hand() -> None:
    pairs = select_pairs(frame(a=[0, 1, 0, 1], b=[0.4, 0.6, 0.4, 0.6]), TOP2, seed=0)  # σ = 0.5 and 0.1, mean 0.3
    np.testing.assert_allclose(pairs.groupby("group_id")["w_inter"].first(), [1.2, 0.8])


@pytest.mark.parametrize("weights", ["none", "intra", "inter", "both"])
def test_weights(weights: str) -> None:
    pairs = select_pairs(many(), change(weights=weights), seed=0)
    wanted = {
        "none": 1.0,
        "intra": pairs["w_intra"],
        "inter": pairs["w_inter"],
        "both": pairs["w_intra"] * pairs["w_inter"],
    }
    assert (pairs["weight"] == wanted[weights]).all()


@pytest.mark.parametrize("settings", [TOP2, change(top=6), change(min_gap=0.7), change(max_pairs_per_group=3)])
def test_weights_have_mean_one(settings: PairSettings) -> None:
    groups = select_pairs(many(), settings, seed=0).groupby("group_id")
    np.testing.assert_allclose(groups["w_intra"].mean(), 1, rtol=0, atol=1e-14)
    assert groups["w_inter"].first().mean() == pytest.approx(1, rel=0, abs=1e-14)


def test_ties_go_to_the_smaller_rollout() -> None:
    pairs = select_pairs(frame(a=[0.5] * 6), TOP2, seed=0)
    assert pairs[NAMES].to_numpy().tolist() == [[0, 4], [0, 5], [1, 4], [1, 5]]
    assert (pairs["gap"] == 0).all() and (pairs["w_intra"] == 1).all()
    pairs = select_pairs(frame(a=[0.1, 0.9, 0.9, 0.9, 0.1, 0.1]), TOP2, seed=0)
    assert pairs[NAMES].to_numpy().tolist() == [[1, 4], [1, 5], [2, 4], [2, 5]]


def test_agrees_with_the_rank_column() -> None:
    rewards = many()
    matrix = rewards["reward"].to_numpy().reshape(20, 12)
    rank = reward_core.ranks(matrix)
    pairs = select_pairs(rewards, change(top=3), seed=0)
    for number, (_, rows) in enumerate(pairs.groupby("group_id")):
        assert set(rank[number, rows["chosen"].unique()]) == {0, 1, 2}
        assert set(rank[number, rows["rejected"].unique()]) == {9, 10, 11}


def test_candidates_without_reward_and_small_groups(caplog: pytest.LogCaptureFixture) -> None:
    rewards = frame(a=[np.nan, 0.9, 0.5, 0.7, 0.3, np.nan], b=[0.1, np.nan, 0.2, 0.3], c=[0.1, 0.2])
    with caplog.at_level(logging.WARNING):
        pairs = select_pairs(rewards, TOP2, seed=0)
    assert set(pairs["group_id"]) == {"a"}
    assert pairs[NAMES].to_numpy().tolist() == [[1, 2], [1, 4], [3, 2], [3, 4]]
    np.testing.assert_allclose(pairs["w_inter"], 1)  # groups that are left out do not move the mean
    assert "(2): b, c" in caplog.text


def test_group_order_and_row_order_do_not_matter() -> None:
    settings = change(selection="random", max_pairs_per_group=3)
    for chosen in (TOP2, settings):
        pairs = select_pairs(many(), chosen, seed=3)
        shuffled = select_pairs(many().sample(frac=1, random_state=0), chosen, seed=3)
        pd.testing.assert_frame_equal(pairs, shuffled)
        assert pairs.equals(pairs.sort_values(tables.keys(tables.PAIRS)))
    alone = select_pairs(many().query("group_id == 'g07'"), settings, seed=3)
    together = select_pairs(many(), settings, seed=3).query("group_id == 'g07'")
    assert alone[NAMES].to_numpy().tolist() == together[NAMES].to_numpy().tolist()  # draws depend on the id alone


def test_min_gap() -> None:
    rewards = frame(a=[0.1, 0.9, 0.5, 0.7, 0.3], b=[0.5, 0.5, 0.5, 0.5])
    pairs = select_pairs(rewards, change(min_gap=0.5), seed=0)
    assert pairs[NAMES].to_numpy().tolist() == [[1, 0], [1, 4], [3, 0]]
    np.testing.assert_allclose(pairs["w_inter"], 1)
    with pytest.raises(UserError, match=r"min_gap: found 0.9, but the largest gap is 0.8"):
        select_pairs(rewards, change(min_gap=0.9), seed=0)


def test_top_too_large() -> None:
    with pytest.raises(UserError, match=r"pairs.top: found 2, but no group has 4 finite rewards \(the largest has 3\)"):
        select_pairs(frame(a=[0.1, 0.2, np.nan, 0.3]), TOP2, seed=0)


def test_subset() -> None:
    every = select_pairs(many(), change(top=4), seed=0).set_index(["group_id", *NAMES])
    some = select_pairs(many(), change(top=4, max_pairs_per_group=5), seed=0)
    assert (some.groupby("group_id").size() == 5).all()
    assert some.set_index(["group_id", *NAMES]).index.isin(every.index).all()
    pd.testing.assert_frame_equal(some, select_pairs(many(), change(top=4, max_pairs_per_group=5), seed=0))
    other = select_pairs(many(), change(top=4, max_pairs_per_group=5), seed=1)
    assert not some[NAMES].equals(other[NAMES])
    assert len(select_pairs(many(), change(top=4, max_pairs_per_group=99), seed=0)) == len(every)


def test_random_selection() -> None:
    rewards = many(num_groups=300)
    rewards.loc[rewards["rollout"] == 5, "reward"] = np.nan
    pairs = select_pairs(rewards, change(selection="random", top=3), seed=0)
    for _, rows in pairs.groupby("group_id"):
        winners, losers = set(rows["chosen"]), set(rows["rejected"])
        assert len(winners) == len(losers) == 3 and not winners & losers and 5 not in winners | losers
    assert abs(pairs["gap"].mean()) < 0.02 and (pairs["gap"] < 0).mean() == pytest.approx(0.5, abs=0.03)
    np.testing.assert_allclose(pairs["gap"], pairs["reward_chosen"] - pairs["reward_rejected"])
    mean = pairs["gap"].abs().groupby(pairs["group_id"]).transform("mean")
    np.testing.assert_allclose(pairs["w_intra"], pairs["gap"].abs() + 1 - mean)
    usage = np.bincount(pairs["chosen"], minlength=12) / len(pairs)
    np.testing.assert_allclose(np.delete(usage, 5), 1 / 11, atol=0.03)


def test_stage(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    scores = pd.DataFrame(
        [(g, m, name, rng.random(), "ok") for g in "ab" for m in range(4) for name in ("ssim", "niqe")],
        columns=tables.SCORES.names,
    ).astype({"rollout": "int32"})
    definition = RewardSettings(fr=["ssim"], nr=["niqe"], weight_fr=0.5, num_rollouts=4)
    rewards, _ = reward_core.rewards(scores, definition)
    tables.write(rewards, tmp_path / "rewards.parquet", tables.rewards_schema(["ssim", "niqe"]))
    job = json.dumps({"pairs": TOP2.model_dump(), "seed": 0})
    options = ["--rewards", str(tmp_path / "rewards.parquet"), "--pairs", str(tmp_path / "pairs.parquet")]
    pairs_stage.main([*options, "--config", job])
    found = tables.read(tmp_path / "pairs.parquet", tables.PAIRS)
    pd.testing.assert_frame_equal(found, select_pairs(rewards, TOP2, seed=0), check_dtype=False)
