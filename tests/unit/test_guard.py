"""The guard: what it measures, and when it stops a training."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from dp2osr import tables
from dp2osr.config import GuardSettings, RewardSettings
from dp2osr.models.backend import read_embeddings
from dp2osr.training.checkpoint import Row
from dp2osr.training.guard import Guard, Measurement, judge, read_images
from training_rig import DEFAULTS, make_backend, policy_settings, train_settings, write_files


def settings(**changes: Any) -> GuardSettings:
    base = {"every": 1, "patience": 2, "min_diversity": 0.25, "max_reward_drop": 0.05}
    return train_settings(guard=base | changes).guard


def history(*rewards: float, diversity: float = 0.08) -> list[Row]:
    rows: list[Row] = []
    for step, reward in enumerate(rewards):
        rows.append(judge(rows, step, Measurement(reward, reward, reward, diversity), settings()))
    return rows


def test_the_reference_is_the_first_best() -> None:
    assert history(0.5) == [
        {"step": 0, "reward": 0.5, "fr": 0.5, "nr": 0.5, "diversity": 0.08, "best": True, "verdict": "ok"}
    ]


def test_better_rewards_are_best_and_patience_ends() -> None:
    rows = history(0.5, 0.6, 0.58, 0.61, 0.60, 0.59)
    assert [row["best"] for row in rows] == [True, True, False, True, False, False]
    assert [row["verdict"] for row in rows[:-1]] == ["ok"] * 5
    assert rows[-1]["verdict"] == "no validation reward above 0.6100 (step 3) in 2 checks"


def test_a_collapse_of_diversity_stops_even_with_the_best_reward() -> None:
    row = judge(history(0.5), 1, Measurement(0.9, 0.9, 0.9, 0.01), settings())
    assert not row["best"] and row["verdict"].startswith("diversity between seeds 0.0100 fell under 0.0200")


@pytest.mark.parametrize("reward", [0.44, math.nan])
def test_a_drop_of_the_reward_stops(reward: float) -> None:
    row = judge(history(0.5, 0.6), 2, Measurement(reward, reward, reward, 0.08), settings())
    assert not row["best"] and row["verdict"].startswith("validation reward")


class Judges:
    """Stand-in for the metrics: psnr is 5 and entropy the mean of the image times 10."""

    def score(self, candidates: torch.Tensor, hr: torch.Tensor) -> dict[str, np.ndarray]:
        assert candidates.shape == hr.shape
        return {"psnr": np.full(len(candidates), 5.0), "entropy": candidates.mean((1, 2, 3)).double().numpy() * 10}


def make_guard(tiny_model: Path, folder: Path, *, validation: int = 2, **options: Any) -> Guard:
    paths = write_files(folder, validation=validation)
    embeddings, negative = read_embeddings(paths["embeddings.safetensors"])
    base: dict[str, Any] = {
        "accelerator": Accelerator(cpu=True),
        "backend": make_backend(tiny_model),
        "images": read_images([paths["lr.tar"]], embeddings),
        "negative": negative,
        "scorer": Judges(),
        "scales": tables.read(paths["scales.parquet"], tables.SCALES),
        "reward": RewardSettings(**DEFAULTS["rewards"]["default"] | {"fr": ["psnr"], "nr": ["entropy"]}),
        "sampling": policy_settings(tiny_model).sampling,
        "settings": settings(num_rollouts=3),
        "base_seed": 0,
        "batch_size": 3,
    }
    return Guard(**base | options)


def test_measurement_does_not_depend_on_the_batch(tiny_model: Path, tmp_path: Path) -> None:
    calls: list[int] = []
    found = []
    for batch_size in (3, 6):
        guard = make_guard(tiny_model, tmp_path, batch_size=batch_size)
        branch = guard.backend.load_control(tiny_model / "controlnet")
        found.append(guard.measure(branch, pause=lambda: calls.append(1)))
    assert len(calls) == 3
    for name in ("reward", "fr", "nr", "diversity"):
        assert getattr(found[0], name) == pytest.approx(getattr(found[1], name), abs=1e-5)
    assert found[0].fr == pytest.approx(0.25) and found[0].diversity > 0
    assert found[0].reward == pytest.approx((found[0].fr + found[0].nr) / 2)


def test_one_seed_has_no_diversity(tiny_model: Path, tmp_path: Path) -> None:
    guard = make_guard(tiny_model, tmp_path, settings=settings(num_rollouts=1))
    found = guard.measure(guard.backend.load_control(tiny_model / "controlnet"), pause=lambda: None)
    assert found.diversity == 0


@pytest.mark.parametrize("sharded", [False, True])
def test_a_sharded_backbone_runs_equally_often_in_all_processes(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sharded: bool
) -> None:
    """Three images are two batches for the first process, of two steps each, and one for the second."""
    monkeypatch.setattr("dp2osr.training.guard.gather_object", lambda rows: rows)
    runs: list[int] = []
    for process in (0, 1):
        place = SimpleNamespace(num_processes=2, process_index=process)
        guard = make_guard(tiny_model, tmp_path, validation=3, accelerator=place)
        guard.backend.sharded = sharded
        guard.backend.backbone.register_forward_pre_hook(lambda *_: runs.append(process))  # noqa: B023
        guard.measure(guard.backend.load_control(tiny_model / "controlnet"), pause=lambda: None)
    assert (runs.count(0), runs.count(1)) == ((4, 4) if sharded else (4, 2))


def test_an_image_without_reward_is_told(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The mean is of the others, and the log says so."""
    guard = make_guard(tiny_model, tmp_path)
    monkeypatch.setattr(Judges, "score", lambda self, images, hr: spoiled(original(self, images, hr)))
    found = guard.measure(guard.backend.load_control(tiny_model / "controlnet"), pause=lambda: None)
    assert np.isfinite(found.reward) and "images have no reward; its mean is of the others" in caplog.text


original = Judges.score


def spoiled(scores: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    scores["psnr"][0] = np.nan
    return scores
