"""What is shared beside one HR image: pyiqa's own values, each HR image computed once, whatever the batches."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

import random_metrics
from dp2osr.iqa import metric as metric_module
from dp2osr.iqa import pretrained, shared
from dp2osr.iqa.metric import Scorer
from dp2osr.iqa.shared import CONSTANTS, FEATURES, Kept, _find, once_a_size
from dp2osr.metrics import METRICS

CPU = torch.device("cpu")
ROLLOUTS = 4


def photos(size: int, count: int) -> torch.Tensor:
    """Return smooth random images (count, 3, size, size) on 8-bit levels."""
    generator = torch.Generator().manual_seed(5)
    coarse = torch.rand(count, 3, 9, 9, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic", align_corners=True)
    return (smooth + 0.05 * torch.randn(smooth.shape, generator=generator)).clamp(0, 1).mul(255).round().div(255)


def candidates(hr: torch.Tensor) -> torch.Tensor:
    """Return ROLLOUTS noisy versions of each image, group by group."""
    generator = torch.Generator().manual_seed(6)
    repeated = hr.repeat_interleave(ROLLOUTS, dim=0)
    strength = torch.linspace(0.02, 0.2, ROLLOUTS).repeat(len(hr)).reshape(-1, 1, 1, 1)
    return (repeated + strength * torch.randn(repeated.shape, generator=generator)).clamp(0, 1)


@pytest.fixture(autouse=True)
def _random_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrained, "create", lambda name, device, **_: random_metrics.create(name, device))


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Count how many images go through each function of FEATURES of the Scorers that a test makes.

    Without the kernels that replace some of these functions: they have a test of their own.
    """
    monkeypatch.setattr(shared, "KERNELS", {})
    seen: Counter[str] = Counter()
    create = metric_module._create

    def counting(name: str, *args: Any) -> Any:
        model = create(name, *args)
        for feature in FEATURES.get(name, ()):
            owner, key = _find(feature.place, model, {})
            monkeypatch.setattr(owner, key, count(getattr(owner, key), feature.place))
        return model

    def count(function: Any, place: str) -> Any:
        def wrapped(*args: Any, **options: Any) -> Any:
            seen[place] += len(args[0][0] if isinstance(args[0], list) else args[0])
            return function(*args, **options)

        return wrapped

    monkeypatch.setattr(metric_module, "_create", counting)
    yield seen


def test_the_tables_name_metrics() -> None:
    assert set(FEATURES) | set(CONSTANTS) <= set(METRICS)


@pytest.mark.parametrize("name", FEATURES)
def test_scores_are_pyiqas_and_an_hr_image_is_computed_once(name: str, counted: Counter[str]) -> None:
    """Two groups in calls that cut across them: against pyiqa one by one, and how many images each function saw."""
    hr = photos(max(64, METRICS[name].min_size), 2)
    images = candidates(hr)
    beside = hr.repeat_interleave(ROLLOUTS, dim=0)
    judge = Scorer([name], device=CPU, niqe=None, niqe_block=32, batch_size=2)
    found = [judge.score(images[a:b], beside[a:b])[name] for a, b in ((0, 3), (3, 4), (4, 8))]
    seen = counted.copy()
    counted.clear()
    model, full = judge._models[name], METRICS[name].kind == "fr"
    pairs = zip(images.split(1), beside.split(1), strict=True)
    single = [float(model(a.clone(), b.clone()) if full else model(a.clone())) for a, b in pairs]
    np.testing.assert_allclose(np.concatenate(found), single, rtol=2e-5, atol=1e-6)
    assert len({round(value, 7) for value in single}) > ROLLOUTS
    for place, plain in counted.items():
        calls = next(feature.calls for feature in FEATURES[name] if feature.place == place)
        share = (calls.count("h") + calls.count("b")) / len(calls)
        wanted = plain * (1 - share) + plain * share * len(hr) / len(images)
        assert seen[place] == (plain / 2 if "r" in calls else round(wanted)), place


def test_images_are_not_changed() -> None:
    """A-FINE normalises what it is given; the metrics after it see the images as they were."""
    hr = photos(64, 1)
    images = candidates(hr)
    before = images.clone(), hr.clone()
    judge = Scorer(["afine_fr", "psnr"], device=CPU, niqe=None, niqe_block=32, batch_size=4)
    found = judge.score(images, hr)["psnr"]
    assert torch.equal(images, before[0]) and torch.equal(hr, before[1])
    error = (images.double() - hr.double()).square().mean(dim=(1, 2, 3))
    np.testing.assert_allclose(found, -10 * torch.log10(error), rtol=1e-5)


def double(images: torch.Tensor, factor: float = 2.0) -> torch.Tensor:
    return images * factor


def test_kept_only_for_equal_arguments() -> None:
    """Values 1, 2 … stand for images; the second call of two is the HR image's."""
    calls: list[int] = []

    def counting(images: torch.Tensor, factor: float = 2.0) -> torch.Tensor:
        calls.append(len(images))
        return double(images, factor)

    kept = Kept(counting, "ch")

    def run(hr: list[float], factor: float = 2.0) -> int:
        before = len(calls)
        images = torch.tensor(hr).reshape(-1, 1, 1, 1)
        kept.begin()
        for each in (images + 7, images):
            assert torch.allclose(kept(each, factor=factor), double(each, factor), equal_nan=True)
        return sum(calls[before + 1 :])

    assert run([1, 1, 1]) == 1  # computed alone
    assert run([1]) == 0
    assert run([1, 1], factor=3.0) == 1
    assert run([2, 2], factor=3.0) == 1
    assert run([1, 2]) == 2  # no single HR image: as without memory
    assert run([2, 2], factor=3.0) == 0
    assert run([float("nan")]) == 1 and run([3]) == 1


def test_one_hr_image_may_stand_for_the_batch() -> None:
    """b: the HR image's result is not repeated for each candidate; where HR images differ, all are computed."""
    kept = Kept(double, "cb")

    def run(hr: list[float]) -> list[float]:
        images = torch.tensor(hr).reshape(-1, 1, 1, 1)
        kept.begin()
        assert len(kept(images + 7)) == len(images)
        return list(kept(images).flatten().tolist())

    assert [run([1, 1, 1]), run([1, 1]), run([1, 2])] == [[2], [2], [2, 4]]


def test_a_size_is_computed_once() -> None:
    calls: list[torch.Size] = []

    @once_a_size
    def area(images: torch.Tensor, factor: int = 1) -> int:
        calls.append(images.shape)
        return images.shape[-1] * images.shape[-2] * factor

    assert [area(torch.zeros(2, 1, 3, 4)), area(torch.ones(5, 1, 3, 4)), area(torch.zeros(1, 1, 4, 4))] == [12, 12, 16]
    assert len(calls) == 2
    assert area(torch.zeros(1, 1, 3, 4), 2) == 24 and area(torch.zeros(1, 1, 3, 4, dtype=torch.float64)) == 12
    assert len(calls) == 4
