import io

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import correlate

from dp2osr.degradation import kernels, ops
from dp2osr.errors import UserError


def ramp(size: int = 24) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).random((3, size, size), dtype=np.float32))


def test_filter_equals_scipy_and_ignores_the_batch() -> None:
    images = torch.stack([ramp(), ramp().flip(1), ramp().flip(2)])
    stacked = kernels.stack([kernels.gaussian(7, 2.0, 0.7, 0.4), kernels.sinc(5, 1.5), kernels.delta()])
    found = ops.filter2d(images, stacked)
    for image, kernel, result in zip(images.numpy(), stacked, found.numpy(), strict=True):
        expected = [correlate(channel, kernel, mode="mirror") for channel in image]
        np.testing.assert_allclose(result, expected, atol=2e-6)
    for index in range(3):
        assert torch.equal(found[index], ops.filter2d(images[index : index + 1], stacked[index : index + 1])[0])
    assert torch.equal(found[2], images[2])


def test_filter_keeps_a_constant_and_names_a_kernel_that_is_too_large() -> None:
    flat = torch.full((1, 3, 16, 16), 0.3)
    found = ops.filter2d(flat, kernels.stack([kernels.plateau(21, 3.0, 3.0)])[:, 3:-3, 3:-3].copy())
    assert found.std() < 1e-6
    with pytest.raises(UserError, match="kernel of 21 px"):
        ops.filter2d(torch.zeros(1, 3, 8, 8), kernels.stack([kernels.plateau(21, 3.0, 3.0)]))


@pytest.mark.parametrize("grey", [False, True])
def test_gaussian_noise_has_its_sigma(grey: bool) -> None:
    clean = torch.full((3, 128, 128), 0.5)
    noise = ops.add_gaussian_noise(clean, 20.0, grey=grey, rng=np.random.default_rng(1)) - clean
    assert noise.std() * 255 == pytest.approx(20.0, rel=0.02)
    assert abs(noise.mean() * 255) < 0.5
    same = torch.equal(noise[0], noise[1]) and torch.equal(noise[1], noise[2])
    assert same == grey
    if not grey:
        assert abs(np.corrcoef(noise.reshape(3, -1).numpy())[0, 1]) < 0.03


def test_noise_is_clamped() -> None:
    noisy = ops.add_gaussian_noise(torch.ones(3, 32, 32), 30.0, grey=False, rng=np.random.default_rng(0))
    assert noisy.max() == 1 and noisy.min() >= 0


def test_poisson_noise_variance() -> None:
    """Two distinct values: v = 2, so a count of x has variance x/v and the added noise scale² x/v."""
    clean = torch.full((3, 256, 256), 102 / 255)
    clean[:, :128] = 51 / 255
    scale = 0.1
    noise = ops.add_poisson_noise(clean, scale, grey=False, rng=np.random.default_rng(2)) - clean
    for rows, value in ((slice(0, 128), 0.2), (slice(128, 256), 0.4)):
        part = noise[:, rows]
        assert part.var() == pytest.approx(scale**2 * value / 2, rel=0.03)
        assert abs(part.mean()) < 4 * (part.var() / part.numel()) ** 0.5


def test_poisson_counts_by_distinct_values() -> None:
    """256 distinct values: v = 256, and the noise is far smaller than with two."""
    clean = (torch.arange(256).float() / 255).expand(3, 256, 256).contiguous()
    noise = ops.add_poisson_noise(clean, 1.0, grey=False, rng=np.random.default_rng(2)) - clean
    assert noise[:, :, 64].var() == pytest.approx(64 / 255 / 256, rel=0.15)


def test_grey_poisson_noise_is_equal_in_the_channels_and_follows_luma() -> None:
    clean = torch.zeros(3, 128, 128)
    clean[1] = 1.0  # luma 0.587 -> 150/255
    clean[:, 0, 0] = 0.0
    noisy = ops.add_poisson_noise(clean * 0.5 + 0.25, 0.05, grey=True, rng=np.random.default_rng(3))
    noise = noisy - (clean * 0.5 + 0.25)
    torch.testing.assert_close(noise[0], noise[1], atol=1e-6, rtol=0)
    luma = round((0.25 + 0.5 * 0.587) * 255) / 255
    assert noise[0].var() == pytest.approx(0.05**2 * luma / 2, rel=0.06)


@pytest.mark.parametrize("quality", [30, 75, 95])
def test_jpeg_is_pillows(quality: int) -> None:
    image = ramp()
    buffer = io.BytesIO()
    Image.fromarray((image.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)).save(
        buffer, "JPEG", quality=quality
    )
    expected = np.array(Image.open(buffer))
    found = ops.compress_jpeg(image, quality)
    assert np.array_equal((found * 255).round().byte().permute(1, 2, 0).numpy(), expected)


def test_lower_quality_is_worse() -> None:
    smooth = ops.filter2d(ramp(48)[None], kernels.stack([kernels.gaussian(7, 2.0, 2.0)]))[0]
    errors = [float((ops.compress_jpeg(smooth, quality) - smooth).abs().mean()) for quality in (95, 60, 30)]
    assert errors[0] < errors[1] < errors[2]


@pytest.mark.parametrize("mode", ops.RESIZE_MODES)
def test_resize_keeps_identity_constant_and_size(mode: str) -> None:
    image = ramp()
    torch.testing.assert_close(ops.resize(image, (24, 24), mode), image, atol=1e-6, rtol=0)
    small = ops.resize(torch.full((3, 24, 24), 0.4), (7, 9), mode)
    assert small.shape == (3, 7, 9) and torch.allclose(small, torch.tensor(0.4))


def test_area_resize_is_the_block_mean_and_modes_are_checked() -> None:
    image = ramp()
    expected = image.reshape(3, 6, 4, 6, 4).mean(dim=(2, 4))
    torch.testing.assert_close(ops.resize(image, (6, 6), "area"), expected)
    with pytest.raises(ValueError, match="found 'cubic'"):
        ops.resize(image, (6, 6), "cubic")


def test_round_8bit() -> None:
    found = ops.round_8bit(torch.tensor([-0.1, 0.5, 1.2])) * 255
    assert found.tolist() == [0.0, 128.0, 255.0]
