import math

import numpy as np
import pytest
from scipy.special import j1

from dp2osr.config_degradation import BlurSettings
from dp2osr.degradation import kernels


@pytest.fixture
def blur(config_dict: dict) -> BlurSettings:
    ranges = {"size": [3, 11], "sigma": [0.2, 1.5], "sinc_probability": 0.1, "probability": 1.0, "pad_to": 21}
    return BlurSettings(**(config_dict["dataset_defaults"]["degradation"]["first"]["blur"] | ranges))


def moments(kernel: np.ndarray) -> np.ndarray:
    """Return the covariance matrix (xx, xy; xy, yy) of a kernel taken as a density."""
    y, x = np.mgrid[: kernel.shape[0], : kernel.shape[0]] - kernel.shape[0] // 2
    return np.array([[(kernel * a * b).sum() for b in (x, y)] for a in (x, y)])


def test_gaussian_by_hand() -> None:
    side, corner = math.exp(-0.5), math.exp(-1)
    total = 1 + 4 * side + 4 * corner
    expected = np.array([[corner, side, corner], [side, 1, side], [corner, side, corner]]) / total
    np.testing.assert_allclose(kernels.gaussian(3, 1.0, 1.0), expected, rtol=1e-12)


@pytest.mark.parametrize("sigma", [1.0, 1.5, 3.0])
def test_isotropic_second_moment_is_sigma_squared(sigma: float) -> None:
    np.testing.assert_allclose(moments(kernels.gaussian(41, sigma, sigma)), np.eye(2) * sigma**2, atol=1e-4)


def test_rotated_gaussian_has_the_covariance_of_its_axes() -> None:
    wide, narrow, angle = 3.0, 1.2, 0.6
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    expected = turn @ np.diag([wide**2, narrow**2]) @ turn.T
    np.testing.assert_allclose(moments(kernels.gaussian(41, wide, narrow, angle)), expected, atol=1e-3)


def test_generalized_gaussian_moment() -> None:
    """In two dimensions exp(-½ (r/σ)^{2β}) has E[r²] = σ² 2^{1/β} Γ(2/β) / Γ(1/β)."""
    sigma, beta = 4.0, 2.0
    expected = sigma**2 * 2 ** (1 / beta) * math.gamma(2 / beta) / math.gamma(1 / beta)
    assert np.trace(moments(kernels.gaussian(41, sigma, sigma, beta=beta))) == pytest.approx(expected, rel=1e-3)


def test_plateau_ratios() -> None:
    """1 / (1 + (r²/σ²)^β): at r = σ half of the centre, at r = 2σ with β = 2 a 17th."""
    kernel = kernels.plateau(21, 3.0, 3.0, beta=2.0)
    assert kernel[10, 13] / kernel[10, 10] == pytest.approx(1 / 2)
    assert kernel[10, 16] / kernel[10, 10] == pytest.approx(1 / 17)


def test_sinc_by_hand_and_cuts_off() -> None:
    cutoff = 1.5
    kernel = kernels.sinc(41, cutoff)
    ratio = (cutoff * j1(cutoff * 2) / (2 * np.pi * 2)) / (cutoff**2 / (4 * np.pi))
    assert kernel[20, 22] / kernel[20, 20] == pytest.approx(ratio, rel=1e-12)
    response = np.abs(np.fft.fft2(kernel, s=(256, 256)))
    omega = 2 * np.pi * np.hypot(np.fft.fftfreq(256)[:, None], np.fft.fftfreq(256)[None])
    np.testing.assert_allclose(response[omega < 0.8 * cutoff], 1, atol=0.12)
    assert response[omega > 1.2 * cutoff].max() < 0.12
    assert response[np.abs(omega - cutoff) < 0.02].mean() == pytest.approx(0.5, abs=0.05)


def test_drawn_kernels_keep_their_ranges_and_sum_to_one(blur: BlurSettings) -> None:
    rng = np.random.default_rng(0)
    drawn = [kernels.draw(rng, blur) for _ in range(3000)]
    counts = {kind: sum(one["kind"] == kind for one in drawn) / 3000 for kind in [*blur.mix.model_dump(), "sinc"]}
    for kind, share in blur.mix.model_dump().items():
        assert counts[kind] == pytest.approx(0.9 * share, abs=0.03)
    assert counts["sinc"] == pytest.approx(0.1, abs=0.02)
    assert {one["size"] for one in drawn} == {3, 5, 7, 9, 11}
    for one in drawn[:200]:
        kernel = kernels.build(one)
        assert kernel.shape == (21, 21) and kernel.sum() == pytest.approx(1, abs=1e-9)
        np.testing.assert_allclose(kernel, kernel[::-1, ::-1], atol=1e-15)
    smooth = [one for one in drawn if one["kind"] != "sinc"]
    assert all(0.2 <= one[axis] <= 1.5 for one in smooth for axis in ("sigma_x", "sigma_y"))
    assert all(one["sigma_x"] == one["sigma_y"] for one in smooth if not one["kind"].endswith("aniso"))
    flat = [one["beta"] for one in smooth if one["kind"].startswith("generalized")]
    assert all(0.5 <= beta <= 4 for beta in flat)
    assert np.mean(np.array(flat) < 1) == pytest.approx(0.5, abs=0.08), "half of the exponents lie below 1"
    assert all(1 <= one["beta"] <= 2 for one in smooth if one["kind"].startswith("plateau"))


def test_sinc_cutoff_range_depends_on_size() -> None:
    rng = np.random.default_rng(0)
    drawn = [kernels.draw_sinc(rng, (3, 19), 21, None) for _ in range(2000)]
    small = [one["cutoff"] for one in drawn if one["size"] < 13]
    large = [one["cutoff"] for one in drawn if one["size"] >= 13]
    assert np.pi / 3 <= min(small) < 1.1 and np.pi / 5 <= min(large) < 0.66 and max(small + large) <= np.pi


def test_no_blur_is_the_identity(blur: BlurSettings) -> None:
    assert kernels.draw(np.random.default_rng(0), blur.model_copy(update={"probability": 0.0})) is None
    assert kernels.build(None).tolist() == [[1.0]]


def test_stack_centres_and_trims() -> None:
    stacked = kernels.stack([kernels.pad(np.full((3, 3), 1 / 9), 21), kernels.delta()])
    assert stacked.shape == (2, 3, 3) and stacked.dtype == np.float32
    assert stacked[1].tolist() == [[0, 0, 0], [0, 1, 0], [0, 0, 0]]
