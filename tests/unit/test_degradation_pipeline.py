import json
from typing import Any

import numpy as np
import pytest
import torch

from dp2osr.config_degradation import DegradationSettings
from dp2osr.degradation import pipeline

SECOND = {"second_probability": 1.0}


def settings_of(config_dict: dict[str, Any], **changes: Any) -> DegradationSettings:
    """Return settings whose first order and final step have the ranges that the tests below name."""
    base = config_dict["dataset_defaults"]["degradation"]
    noise = {
        "gaussian_probability": 0.5,
        "gaussian_sigma": [1, 10],
        "poisson_scale": [0.05, 1],
        "grey_probability": 0.4,
    }
    resize = {"up": 0.2, "down": 0.7, "keep": 0.1, "scale": [0.5, 1.5]}
    first = base["first"] | {"resize": resize, "noise": noise, "jpeg_quality": [60, 95]}
    final = {"sinc_probability": 0.8, "sinc_size": [3, 7], "pad_to": 21, "jpeg_quality": [60, 95]}
    return DegradationSettings(
        **(base | {"scale": 4, "second_probability": 0.0, "first": first, "final": final} | changes)
    )


def batch(count: int = 4, size: int = 64) -> torch.Tensor:
    rough = np.random.default_rng(0).random((count, 3, size // 8, size // 8), dtype=np.float32)
    return torch.nn.functional.interpolate(torch.from_numpy(rough), scale_factor=8, mode="bilinear")


@pytest.mark.parametrize("changes", [{}, SECOND])
def test_size_8bit_range_and_json(config_dict: dict[str, Any], changes: dict[str, Any]) -> None:
    lr, parameters = pipeline.degrade(batch(), settings=settings_of(config_dict, **changes), seeds=[1, 2, 3, 4])
    assert lr.shape == (4, 3, 16, 16) and lr.dtype == torch.float32
    assert lr.min() >= 0 and lr.max() <= 1
    torch.testing.assert_close(lr * 255, (lr * 255).round(), atol=1e-4, rtol=0)
    assert json.loads(json.dumps(parameters)) == parameters
    assert all((drawn["second"] is None) == (not changes) for drawn in parameters)


@pytest.mark.parametrize("changes", [{}, SECOND])
def test_result_depends_on_the_seed_and_never_on_the_batch(
    config_dict: dict[str, Any], changes: dict[str, Any]
) -> None:
    settings, hr, seeds = settings_of(config_dict, **changes), batch(6), [11, 12, 13, 14, 15, 16]
    whole, parameters = pipeline.degrade(hr, settings=settings, seeds=seeds)
    for index, seed in enumerate(seeds):
        alone, drawn = pipeline.degrade(hr[index : index + 1], settings=settings, seeds=[seed])
        assert torch.equal(alone[0], whole[index]) and drawn[0] == parameters[index]
    assert torch.equal(pipeline.apply(hr, parameters), whole), "stored parameters give the same pixels"
    again = json.loads(json.dumps(parameters))
    assert torch.equal(pipeline.apply(hr, again), whole), "and so do those read back from JSON"
    other, _ = pipeline.degrade(hr, settings=settings, seeds=[seed + 100 for seed in seeds])
    assert not torch.equal(other, whole)


def test_threads_do_not_matter(config_dict: dict[str, Any]) -> None:
    settings, hr = settings_of(config_dict), batch(2)
    one, _ = pipeline.degrade(hr, settings=settings, seeds=[1, 2])
    torch.set_num_threads(2)
    two, _ = pipeline.degrade(hr, settings=settings, seeds=[1, 2])
    torch.set_num_threads(1)
    assert torch.equal(one, two)


def test_parameters_keep_their_ranges_and_shares(config_dict: dict[str, Any]) -> None:
    settings = settings_of(config_dict, second_probability=0.5)
    drawn = [pipeline.sample_parameters(settings, seed) for seed in range(2000)]
    assert np.mean([one["second"] is not None for one in drawn]) == pytest.approx(0.5, abs=0.04)
    first = [one["first"] for one in drawn]
    for direction, share in (("up", 0.2), ("down", 0.7), ("keep", 0.1)):
        factors = [one["resize"]["factor"] for one in first if one["resize"]["direction"] == direction]
        assert len(factors) / 2000 == pytest.approx(share, abs=0.03)
        low, high = {"up": (1, 1.5), "down": (0.5, 1), "keep": (1, 1)}[direction]
        assert low <= min(factors) and max(factors) <= high
    assert {one["resize"]["mode"] for one in first} == {"area", "bilinear", "bicubic"}
    assert {one["jpeg_quality"] for one in first} == set(range(60, 96))
    gaussian = [one["noise"]["sigma"] for one in first if one["noise"]["kind"] == "gaussian"]
    poisson = [one["noise"]["scale"] for one in first if one["noise"]["kind"] == "poisson"]
    assert len(gaussian) / 2000 == pytest.approx(0.5, abs=0.04)
    assert min(gaussian) >= 1 and max(gaussian) <= 10 and min(poisson) >= 0.05 and max(poisson) <= 1
    assert np.mean([one["noise"]["grey"] for one in first]) == pytest.approx(0.4, abs=0.04)
    final = [one["final"] for one in drawn]
    assert np.mean([one["order"] == pipeline.JPEG_LAST for one in final]) == pytest.approx(0.5, abs=0.04)
    sinc = [one["sinc"] for one in final if one["sinc"]]
    assert len(sinc) / 2000 == pytest.approx(0.8, abs=0.03)
    assert {one["size"] for one in sinc} == {3, 5, 7} and min(one["cutoff"] for one in sinc) >= np.pi / 3


def test_second_order_sizes_are_relative_to_the_lr_size(
    config_dict: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[tuple[int, int]] = []
    resize = pipeline.ops.resize
    monkeypatch.setattr(pipeline.ops, "resize", lambda i, size, mode: sizes.append(size) or resize(i, size, mode))
    settings = settings_of(config_dict, **SECOND)
    drawn = pipeline.degrade(batch(1), settings=settings, seeds=[3])[1][0]
    first, second = (int(base * drawn[order]["resize"]["factor"]) for base, order in ((64, "first"), (16, "second")))
    assert sizes == [(first, first), (second, second), (16, 16)]


@pytest.mark.parametrize("changes", [{}, SECOND])
def test_jpeg_ends_the_first_order_and_is_in_the_final_step(
    config_dict: dict[str, Any], monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    qualities: list[int] = []
    jpeg = pipeline.ops.compress_jpeg
    monkeypatch.setattr(pipeline.ops, "compress_jpeg", lambda i, quality: qualities.append(quality) or jpeg(i, quality))
    (drawn,) = pipeline.degrade(batch(1), settings=settings_of(config_dict, **changes), seeds=[3])[1]
    assert qualities == [drawn["first"]["jpeg_quality"], drawn["final"]["jpeg_quality"]]


def test_final_order_decides_what_comes_last(config_dict: dict[str, Any]) -> None:
    """JPEG last: one more pass of the same quality changes nearly nothing; JPEG first: it does."""
    drawn = [pipeline.sample_parameters(settings_of(config_dict), 5)]
    drawn[0]["final"]["jpeg_quality"] = 30
    errors = {}
    for order in (pipeline.JPEG_LAST, pipeline.JPEG_FIRST):
        drawn[0]["final"]["order"] = order
        lr = pipeline.apply(batch(1), drawn)
        errors[order] = float((pipeline.ops.compress_jpeg(lr[0], 30) - lr[0]).abs().mean())
    assert errors[pipeline.JPEG_LAST] < 0.5 * errors[pipeline.JPEG_FIRST]


def test_number_of_seeds_is_checked(config_dict: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="found 1, wanted one for each of 2"):
        pipeline.degrade(batch(2), settings=settings_of(config_dict), seeds=[1])


@pytest.mark.gpu
def test_gpu_equals_cpu_up_to_rounding(config_dict: dict[str, Any]) -> None:
    settings, hr = settings_of(config_dict, **SECOND), batch(4)
    cpu, parameters = pipeline.degrade(hr, settings=settings, seeds=[1, 2, 3, 4])
    gpu, same = pipeline.degrade(hr.cuda(), settings=settings, seeds=[1, 2, 3, 4])
    assert gpu.is_cuda and same == parameters
    assert (gpu.cpu() - cpu).abs().mean() * 255 < 0.5
