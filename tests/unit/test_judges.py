"""Metrics with weights, as true-size networks from files of the true names: loading, batches, sizes, provenance."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import iqa_stand_ins
from dp2osr import weights
from dp2osr.iqa import origin
from dp2osr.iqa.metric import Scorer
from dp2osr.metrics import METRICS

CPU = torch.device("cpu")
SMALL = ["lpips", "topiq_fr", "topiq_nr", "musiq", "clipiqa+", "afine_fr", "afine_nr"]
LARGE = ["nima", "topiq_iaa", "maniqa"]  # work on 299, 384 and 224 px whatever the image


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "weights"
    iqa_stand_ins.use(folder, monkeypatch)
    return folder


def images(side: int = 96) -> tuple[torch.Tensor, torch.Tensor]:
    """Return three candidates of different kinds and their HR images, (3, 3, side, side) each."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.rand(3, 3, side, side, generator=generator)
    smooth = torch.nn.functional.avg_pool2d(noise[1:2], 9, 1, 4)
    candidates = torch.cat([noise[:1], smooth, 0.5 + 0.5 * noise[2:]])
    return candidates, (candidates + 0.1 * torch.rand(candidates.shape, generator=generator)).clamp(0, 1)


def judge(name: str, device: torch.device = CPU) -> Scorer:
    scorer = Scorer([name], device=device, niqe=None, niqe_block=32, batch_size=3)
    model: Any = scorer._models[name]
    iqa_stand_ins.randomise(model)
    iqa_stand_ins.shorten(model.net, name)
    return scorer


@pytest.mark.parametrize("name", [*SMALL, *LARGE])
def test_files_are_loaded_and_a_batch_scores_as_single_images(
    name: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    iqa_stand_ins.add(cache, name, monkeypatch)
    assert iqa_stand_ins.names_in(cache) == set(METRICS[name].weights)
    scorer = judge(name)
    count = 2 if name in LARGE else 3
    candidates, hr = (side[:count] for side in images())
    model: Any = scorer._models[name]
    given = [
        (a.clone(), b.clone()) if METRICS[name].kind == "fr" else (a.clone(),)
        for a, b in zip(candidates.split(1), hr.split(1), strict=True)
    ]
    with torch.inference_mode():
        single = np.array([float(model(*each)) for each in given])
        assert np.isfinite(single).all() and np.ptp(single) > 1e-4
        if METRICS[name].batch_safe:
            both = (candidates, hr) if METRICS[name].kind == "fr" else (candidates,)
            found = model(*both).reshape(-1).numpy()
            np.testing.assert_allclose(found, single, rtol=1e-6, atol=1e-3 * np.ptp(single))
        else:
            assert scorer.micro_batch(name, 96, 96) == 1
    made = origin.origins([name], niqe=None, vqr1=None)[name]
    files = [file for file in METRICS[name].weights if not file.startswith("hub:")]
    assert all(f"{file} sha256:" in made for file in files) and made.count("sha256:") == len(METRICS[name].weights)


# Of pyiqa's calibration pairs (tests/unit/test_iqa_metric.py), as pyiqa publishes its own results.
PUBLISHED = {
    "lpips": [0.7237, 0.2572, 0.0508, 0.0521, 0.4253],
    "musiq": [12.4773, 75.7764, 73.7459, 75.4604, 38.0248],
}


@pytest.mark.skipif(not weights.in_use(), reason="needs the true weights: a cache in DP2OSR_WEIGHTS")
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_values(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = weights.in_use()
    assert folder is not None
    iqa_stand_ins.use(folder, monkeypatch)
    distorted, photos = iqa_stand_ins.calibration_pairs()
    scorer = Scorer([name], device=CPU, niqe=None, niqe_block=32, batch_size=1)
    found = scorer.score(distorted, photos)[name]
    np.testing.assert_allclose(found, PUBLISHED[name], rtol=0, atol=1e-4 if name == "lpips" else 1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*SMALL, *LARGE])
def test_the_gpu_scores_as_the_cpu(name: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To a hundredth of the spread between images: pyiqa lets convolutions run in TF32, with 10 bits of mantissa."""
    iqa_stand_ins.add(cache, name, monkeypatch)
    candidates, hr = images(max(96, METRICS[name].min_size))
    found = [judge(name, torch.device(where)).score(candidates.clone(), hr.clone())[name] for where in ("cpu", "cuda")]
    np.testing.assert_allclose(found[1], found[0], atol=1e-2 * np.ptp(found[0]))


def test_sizes_that_afine_does_not_take_are_recorded(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metric = METRICS["afine_nr"]
    assert [metric.misfit(*size) for size in ((96, 64), (96, 100), (31, 64))] == ["", "wrong_size", "too_small"]
    assert [metric.named(each, 96, 100) for each in ("ok", "too_small", "nan")] == ["ok", "wrong_size", "nan"]
    iqa_stand_ins.add(cache, "afine_nr", monkeypatch)
    scorer = Scorer(["afine_nr"], device=CPU, niqe=None, niqe_block=32, batch_size=1)
    assert np.isnan(scorer.score(torch.rand(1, 3, 96, 100))["afine_nr"]).all()


def test_a_pickle_that_is_more_than_tensors_is_refused(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dp2osr.errors import UserError

    iqa_stand_ins.add(cache, "musiq", monkeypatch)
    file = next((cache / "torch" / "hub" / "pyiqa").glob("musiq*"))
    torch.save({"state": Path("x")}, file)
    with pytest.raises(UserError, match=r"metric 'musiq': no weights in .*Weights only load failed"):
        Scorer(["musiq"], device=CPU, niqe=None, niqe_block=32, batch_size=1)


def test_sha256_is_the_manifests_where_there_is_one(cache: Path) -> None:
    file = cache / "torch" / "hub" / "pyiqa" / METRICS["musiq"].weights[0]
    file.parent.mkdir(parents=True)
    file.write_bytes(b"first")
    weights.add_item(cache, "metric:musiq", [file.relative_to(cache).as_posix()])
    digest = weights.facts_of(file).sha256
    file.write_bytes(b"other")  # as long: what the manifest says is not read again
    found = origin.origins(["musiq", "psnr"], niqe=None, vqr1=None)
    assert found["musiq"].endswith(f"; {file.name} sha256:{digest}")
    assert found["psnr"].startswith("pyiqa ") and found["psnr"].endswith(", score 1")
