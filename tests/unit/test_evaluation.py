"""Evaluation: closed forms against brute force, intervals against theory, controls with one candidate."""

import itertools
import json
import logging
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from dp2osr import evaluation, tables
from dp2osr.config import EvaluateSettings, RewardSettings
from dp2osr.errors import UserError
from dp2osr.preference import reward as reward_core
from dp2osr.stages import evaluate as evaluate_stage

M = 8
REWARD = RewardSettings(fr=["ssim"], nr=["niqe"], weight_fr=0.5, num_rollouts=M)
SETTINGS = EvaluateSettings(bootstrap=2000, confidence=0.95)


def raw(
    num_photos: int = 12, crops: int = 2, *, better: float = 0.0, candidates: int = M, seed: int = 0
) -> pd.DataFrame:
    """Raw scores of a policy; `better` is added to ssim of every candidate."""
    rng = np.random.default_rng(seed)
    groups = [f"{photo:016x}-{crop:03d}" for photo in range(num_photos) for crop in range(crops)]
    keys = [(group, rollout) for group in groups for rollout in range(candidates)]
    frame = pd.DataFrame(keys, columns=["group_id", "rollout"]).astype({"rollout": "int32"})
    return frame.assign(ssim=rng.random(len(frame)) + better, niqe=rng.random(len(frame)), piqe=rng.random(len(frame)))


def long(wide: pd.DataFrame) -> pd.DataFrame:
    scores = wide.melt(["group_id", "rollout"], var_name="metric", value_name="score")
    return scores.assign(status="ok")


def images(frame: pd.DataFrame) -> pd.DataFrame:
    groups = frame["group_id"].unique()
    return pd.DataFrame({"image_id": groups, "photo_id": [group[:16] for group in groups]})


def run(seed: int = 0, **policies: pd.DataFrame) -> pd.DataFrame:
    """Evaluate; `base` is the reference."""
    rewards, scales = reward_core.rewards(long(policies["base"]), REWARD)
    table = evaluation.evaluate(
        {**policies, "base": rewards},
        reference="base",
        scales=scales,
        images=images(rewards),
        reward=REWARD,
        settings=SETTINGS,
        seed=seed,
    )
    return table.set_index(["policy", "statistic", "m"])


@pytest.mark.parametrize("m", [1, 2, 3, 6])
def test_at_m_is_the_mean_over_all_subsets(m: int) -> None:
    rewards = np.random.default_rng(0).random((3, 6))
    rewards[1, 2] = np.nan  # five candidates
    for row, (mean, best, worst) in zip(rewards, zip(*evaluation.at_m(rewards, m), strict=True), strict=True):
        subsets = list(itertools.combinations(row[np.isfinite(row)], m))
        if not subsets:
            assert np.isnan([mean, best, worst]).all()
            continue
        assert mean == pytest.approx(np.mean(subsets))
        assert best == pytest.approx(np.max(subsets, axis=1).mean())
        assert worst == pytest.approx(np.min(subsets, axis=1).mean())


def test_at_m_of_many_candidates_stays_finite() -> None:
    rewards = np.sort(np.random.default_rng(0).random((1, 1000)))
    _, best, worst = evaluation.at_m(rewards, 500)
    assert worst[0] < 0.01 < 0.99 < best[0] <= rewards.max()


def test_subset_sizes() -> None:
    assert evaluation.subset_sizes(1) == [1]
    assert evaluation.subset_sizes(8) == [1, 2, 4, 8]
    assert evaluation.subset_sizes(12) == [1, 2, 4, 8, 12]


def test_win_rate() -> None:
    policy, reference = np.array([[0.5, 0.5, 0.1, np.nan]]), np.array([[0.4, 0.5, 0.2, 0.0]])
    assert evaluation.win_rate(policy, reference).tolist() == [0.5]  # win, tie, loss, no seed
    assert evaluation.win_rate(np.array([[0.3]]), reference).tolist() == [0.5]  # one candidate meets all four


def test_reference_rows() -> None:
    base = raw()
    table = run(base=base)
    assert (table["difference"] == 0).all() and (table[["ci_low", "ci_high"]] == 0).all(axis=None)
    assert table.loc["base", "win_rate", M]["value"] == 0.5
    assert table.loc["base", "ssim", M]["value"] == pytest.approx(base["ssim"].mean())
    rewards, _ = reward_core.rewards(long(base), REWARD)
    groups = rewards.groupby("group_id")["reward"]
    for statistic, m, wanted in (
        ("mean_at_m", 1, groups.mean()),
        ("best_at_m", M, groups.max()),
        ("worst_at_m", M, groups.min()),
        ("best_at_m", 1, groups.mean()),
        ("std", M, groups.std(ddof=0)),
        ("ssim__std", M, base.groupby("group_id")["ssim"].std(ddof=0)),
    ):
        row = table.loc["base", statistic, m]
        assert row["value"] == pytest.approx(wanted.mean())
        assert row["value_low"] < row["value"] < row["value_high"]
    assert table["in_reward"]["base", "ssim", M] and not table["in_reward"]["base", "piqe", M]
    assert table["in_reward"]["base", "ssim__std", M] and not table["in_reward"]["base", "piqe__std", M]
    assert not table["higher_better"]["base", "ssim__std", M]
    assert table["higher_better"]["base", "ssim", M] and not table["higher_better"]["base", "niqe", M]
    assert not table["higher_better"]["base", "std", M] and table["higher_better"]["base", "fr", M]
    assert (table["num_groups"] == 24).all() and (table["num_photos"] == 12).all()


def test_a_shifted_policy() -> None:
    base = raw()
    table = run(base=base, tuned=base.assign(ssim=base["ssim"] + 0.25))
    row = table.loc["tuned", "ssim", M]
    assert row["difference"] == pytest.approx(0.25)  # the same for each group: no width
    assert row["ci_low"] == pytest.approx(0.25) and row["ci_high"] == pytest.approx(0.25)
    assert row["value"] - row["reference"] == pytest.approx(row["difference"])
    assert table.loc["tuned", "win_rate", M]["value"] == 1
    assert table.loc["tuned", "best_at_m", M]["value"] > 1  # unclipped
    assert table.loc["tuned", "nr", M]["difference"] == 0


def test_row_and_policy_order_do_not_matter() -> None:
    base, tuned = raw(), raw(seed=1)
    first = run(base=base, tuned=tuned)
    again = run(tuned=tuned.sample(frac=1, random_state=0), base=base.sample(frac=1, random_state=1))
    pd.testing.assert_frame_equal(first, again, check_exact=True)
    other = run(seed=1, base=base, tuned=tuned)
    assert not first["ci_low"].equals(other["ci_low"]) and first["value"].equals(other["value"])


def test_interval_agrees_with_theory() -> None:
    """Independent photographs: mean ± 1.96 · std / sqrt(n); four equal crops of each change nothing."""
    values = np.random.default_rng(0).normal(size=(400, 1))
    half = 1.96 * values.std() / 20
    for crops in (1, 4):
        photos = np.repeat([f"{number:04d}" for number in range(400)], crops).astype(object)
        resamples = evaluation.make_resamples(photos, SETTINGS.model_copy(update={"bootstrap": 8000}), seed=0)
        low, high = resamples.interval(np.repeat(values, crops, axis=0))[:, 0]
        assert low == pytest.approx(values.mean() - half, abs=0.1 * half)
        assert high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_interval_against_a_plain_loop() -> None:
    photos = np.array(["x", "y", "y", "z", "z", "z"], dtype=object)
    values = np.array([[0.1], [0.5], [np.nan], [0.2], [0.9], [0.4]])
    resamples = evaluation.make_resamples(photos, SETTINGS.model_copy(update={"bootstrap": 500}), seed=5)
    assert (resamples.weight.sum(axis=1) == 3).all()
    means = []
    for weights in resamples.weight.astype(int):
        drawn = [np.repeat(values[photos == name, 0], count) for name, count in zip("xyz", weights, strict=True)]
        means.append(np.nanmean(np.concatenate(drawn)))
    np.testing.assert_allclose(resamples.interval(values)[:, 0], np.quantile(means, [0.025, 0.975]))


def test_control_with_one_candidate() -> None:
    base = raw()
    table = run(base=base, bicubic=raw(candidates=1, seed=2))
    control = table.loc["bicubic"]
    assert set(control.index.get_level_values("m")) == {1}
    assert "std" not in control.index.get_level_values("statistic")
    assert control.loc["best_at_m", 1]["value"] == control.loc["mean_at_m", 1]["value"]
    means = table.loc["base", "mean_at_m", M]["value"]
    assert control.loc["mean_at_m", 1]["reference"] == pytest.approx(means)
    assert 0 < control.loc["win_rate", 1]["value"] < 1


def test_candidates_without_reward(caplog: pytest.LogCaptureFixture) -> None:
    base, tuned = raw(), raw(seed=1)
    gone = tuned["group_id"] == tuned["group_id"].iloc[0]
    tuned.loc[gone, "niqe"] = np.nan
    tuned.loc[tuned.index[-1], "ssim"] = np.nan
    with caplog.at_level(logging.WARNING):
        table = run(base=base, tuned=tuned)
    assert "policy tuned: no reward in 1 of 24 groups" in caplog.text
    assert f"policy tuned: no ssim of 1 of {24 * M} candidates; its statistics are of the others" in caplog.text
    assert f"policy tuned: no reward of {M + 1} of {24 * M} candidates" in caplog.text
    assert "policy base: no" not in caplog.text
    assert table.loc["tuned", "mean_at_m", 1]["num_groups"] == 23
    assert table.loc["tuned", "best_at_m", M]["num_groups"] == 22  # the last group has M - 1
    assert table.loc["tuned", "ssim", M]["num_groups"] == 24
    assert table.loc["base", "best_at_m", M]["num_groups"] == 24


def test_one_photograph_has_no_interval(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        table = run(base=raw(num_photos=1, crops=4))
    assert table[["ci_low", "ci_high", "value_low"]].isna().all(axis=None) and table["value"].notna().all()
    assert "one photograph" in caplog.text


def test_wrong_input() -> None:
    rewards, scales = reward_core.rewards(long(raw()), REWARD)
    common = {"scales": scales, "reward": REWARD, "settings": SETTINGS, "seed": 0}
    with pytest.raises(UserError, match="no rewards of the reference 'other'"):
        evaluation.evaluate({"base": rewards}, reference="other", images=images(rewards), **common)
    with pytest.raises(UserError, match="no row for group"):
        evaluation.evaluate({"base": rewards}, reference="base", images=images(rewards)[1:], **common)


def test_stage(tmp_path: Path) -> None:
    base, tuned = raw(), raw(seed=1, better=0.2)
    paths = {}
    for name, wide in (("base", base), ("tuned", tuned)):
        rewards, scales = reward_core.rewards(long(wide), REWARD)
        paths[name] = tmp_path / f"{name}.parquet"
        made = {metric: "pyiqa 1, score 1" for metric in ("ssim", "niqe", "piqe")}
        tables.write(rewards, paths[name], tables.rewards_schema(["ssim", "niqe", "piqe"]), origins=made)
        tables.write(scales, tmp_path / f"{name}-scales.parquet", tables.SCALES)
    text = dict.fromkeys(("source", "sha256", "split", "status", "reason"), "ok")
    number = dict.fromkeys(("width", "height", "crop_x", "crop_y", "crop_size", "shard"), 0)
    tables.write(images(base).assign(**text, **number), tmp_path / "images.parquet", tables.IMAGES)
    job = {"reward": REWARD.model_dump(), "evaluate": SETTINGS.model_dump(), "seed": 0, "reference": "base"}
    options = ["--policy", *(f"{name}={path}" for name, path in paths.items())]
    options += ["--scales", str(tmp_path / "base-scales.parquet"), "--images", str(tmp_path / "images.parquet")]
    evaluate_stage.main([*options, "--evaluation", str(tmp_path / "e.parquet"), "--config", json.dumps(job)])
    found = tables.read(tmp_path / "e.parquet", tables.EVALUATION).set_index(["policy", "statistic", "m"])
    pd.testing.assert_frame_equal(found, run(base=base, tuned=tuned), check_dtype=False, check_index_type=False)
    assert tables.read_origins(tmp_path / "e.parquet") == made
    tables.write(rewards, paths["tuned"], tables.rewards_schema(["ssim", "niqe", "piqe"]), origins={"niqe": "pyiqa 2"})
    with pytest.raises(UserError, match=r"tuned\.parquet: metric 'niqe' is by pyiqa 2"):
        evaluate_stage.main([*options, "--evaluation", str(tmp_path / "f.parquet"), "--config", json.dumps(job)])
    with pytest.raises(UserError, match="a name twice"):
        twice = ["--policy", f"a={paths['base']}", f"a={paths['base']}", *options[3:]]
        evaluate_stage.main([*twice, "--evaluation", str(tmp_path / "f.parquet"), "--config", json.dumps(job)])
