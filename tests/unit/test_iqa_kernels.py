"""Faster kernels: the numbers of the functions that they stand in for, and those only where a metric runs."""

import logging
from typing import Any

import numpy as np
import pytest
import torch

from dp2osr.iqa.kernels import KERNELS, Median, convolve, factors, median, one_for_all, planar, unpooled
from dp2osr.iqa.metric import CPU_PIXEL, Scorer
from dp2osr.iqa.shared import SharedHr
from dp2osr.metrics import METRICS

CPU = torch.device("cpu")


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def pyiqas() -> tuple[Any, torch.Tensor]:
    """Return pyiqa's filter2 and SSIM's window (1, 1, 11, 11), float32 values in float64."""
    from pyiqa.matlab_utils import filter2, fspecial

    return filter2, fspecial(11, 1.5, 1).double()


def test_the_tables_name_metrics() -> None:
    assert set(KERNELS) | set(CPU_PIXEL) <= set(METRICS)


def test_convolution_by_hand() -> None:
    """A window of (1, 2) by (3, 1, 0): 1·(3·1 + 1·2) + 2·(3·4 + 1·5) = 39."""
    window = torch.outer(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 1.0, 0.0])).double()[None, None]
    image = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]).double()[None, None]
    assert convolve(pytest.fail)(image, window, "valid").item() == pytest.approx(39, abs=1e-12)


@pytest.mark.parametrize("shape", [(3, 1, 40, 33), (1, 1, 11, 12)])
def test_convolution_is_pyiqas(shape: tuple[int, ...]) -> None:
    """Squares of 8-bit levels, as SSIM has: to 1e-8 of the largest; a flat image to float64 rounding."""
    filter2, window = pyiqas()
    images = (random(*shape) * 255).round().double().square()
    flat = torch.full(shape, 65025.0, dtype=torch.float64)
    for given, off in ((images, 1e-8 * 255**2), (flat, 1e-14 * 255**2)):
        found, wanted = convolve(filter2)(given, window, "valid"), filter2(given, window, "valid")
        torch.testing.assert_close(found, wanted, rtol=0, atol=off)


def test_other_convolutions_are_left_to_pyiqa() -> None:
    """Another window, kind of number, border or number of channels."""
    filter2, window = pyiqas()
    images = random(2, 1, 20, 20).double()
    slanted = window + 1e-6 * torch.eye(11).double()
    assert factors(window[0, 0]) is not None and factors(slanted[0, 0]) is None
    for given in (
        (images, slanted, "valid"),
        (images.float(), window.float(), "valid"),
        (images, window, "same"),
        (random(2, 3, 20, 20).double(), window.repeat(3, 1, 1, 1), "valid"),
    ):
        assert torch.equal(convolve(filter2)(*given), filter2(*given))


def test_planar_has_the_same_numbers_in_another_order() -> None:
    numbers = torch.complex(random(2, 3, 5), random(2, 3, 5, seed=1))
    found = planar(torch.view_as_real)(numbers)
    assert torch.equal(found, torch.view_as_real(numbers))
    assert found[..., 0].is_contiguous() and found[..., 1].is_contiguous()


def test_pooling_one_pixel_is_the_image() -> None:
    images = random(2, 3, 8, 8)
    pool = torch.nn.functional.avg_pool2d
    assert unpooled(pool)(images, 1) is images and torch.equal(pool(images, 1), images)
    assert torch.equal(unpooled(pool)(images, 2), pool(images, 2))


def test_one_row_of_zeros_stands_for_the_batch() -> None:
    assert torch.equal(one_for_all(torch.zeros)(7, 4, 1, 2, 2), torch.zeros(1, 4, 1, 2, 2))
    assert torch.equal(one_for_all(torch.zeros)(7, 2, dtype=torch.int64), torch.zeros(7, 2, dtype=torch.int64))


@pytest.mark.parametrize("length", [1, 2, 9, 10, 1000])
def test_median_is_torchs(length: int) -> None:
    """The lower of two middle values, NaN where there is one, ties among them."""
    values = (random(3, 2, length) * 50).round()
    values[1, 0, length // 2] = float("nan")
    before = values.clone()
    found, wanted = median(torch.median)(values, dim=-1, keepdim=True), torch.median(values, dim=-1, keepdim=True)
    assert isinstance(found, Median) and found.values.dtype == torch.float32
    assert torch.equal(values.nan_to_num(-1), before.nan_to_num(-1))
    torch.testing.assert_close(found.values, wanted.values, rtol=0, atol=0, equal_nan=True)
    other = median(torch.median)(values, dim=0, keepdim=False)
    torch.testing.assert_close(other.values, torch.median(values, dim=0).values, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", KERNELS)
def test_scores_are_those_of_a_metric_of_pyiqas_own(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """Against create_metric image by image, odd sizes, an equal and a flat image among them: bits, ssim's to 1e-9."""
    import pyiqa

    height, width = (METRICS[name].min_size + 20, METRICS[name].min_size + 33)
    hr = (random(3, height, width) * 255).round() / 255
    images = torch.stack([hr, 0.5 * hr + 0.25, torch.full_like(hr, 0.5), (hr + 0.1 * random(*hr.shape)).clamp(0, 1)])
    judge = Scorer([name], device=CPU, niqe=None, niqe_block=32, batch_size=3)
    found = judge.score(images, hr[None])[name]
    plain = pyiqa.create_metric(name, device=CPU)
    single = [float(plain(image[None], hr[None])) for image in images]
    np.testing.assert_allclose(found, single, rtol=0, atol=3e-7 if name == "fsim" else 1e-9)
    assert found[0] == pytest.approx(1, abs=1e-6) and min(found) < 0.9
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]  # no batch failed


def test_libraries_are_as_they_were_for_everybody_else() -> None:
    """While FSIM runs, its module alone sees other functions of torch; afterwards it sees torch again."""
    import pyiqa
    from pyiqa.archs import fsim_arch

    functions = torch.view_as_real, torch.fft.ifft2, torch.nn.functional.avg_pool2d, torch.zeros, torch.median
    shared = SharedHr(pyiqa.create_metric("fsim", device=CPU))
    with shared.in_use():
        assert fsim_arch.torch is not torch and fsim_arch.torch.sqrt is torch.sqrt
        assert fsim_arch.torch.view_as_real is not torch.view_as_real
        assert fsim_arch.torch.fft.ifft2 is not torch.fft.ifft2 and fsim_arch.torch.fft.fft2 is torch.fft.fft2
        now = torch.view_as_real, torch.fft.ifft2, torch.nn.functional.avg_pool2d, torch.zeros, torch.median
        assert now == functions
    assert fsim_arch.torch is torch
