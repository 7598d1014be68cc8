import numpy as np

from dp2osr.dead_leaves import _radii, dead_leaves


def test_seed_decides_the_image() -> None:
    image = dead_leaves(5, 64)
    assert image.shape == (64, 64, 3) and image.dtype == np.uint8
    assert np.array_equal(image, dead_leaves(5, 64))
    assert not np.array_equal(image, dead_leaves(6, 64))


def test_images_have_content_and_correlated_channels() -> None:
    for seed in range(4):
        image = dead_leaves(seed, 96).reshape(-1, 3).astype(float)
        assert image.std() > 15
        assert np.corrcoef(image.T)[0, 2] > 0.2, "natural colours: the channels go together"


def test_radii_follow_the_power_law() -> None:
    radii = np.concatenate([_radii(np.random.default_rng(seed), 384) for seed in range(40)])
    # A density of 1/r³ gives P(r > 2 low) = 1/4 far below the upper end; the low end is drawn in 0.8 to 4 % of 384.
    assert radii.min() >= 0.008 * 384 and radii.max() <= 0.45 * 384
    one = _radii(np.random.default_rng(1), 384)
    assert abs(np.mean(one > 2 * one.min()) - 0.25) < 0.08


def test_spectrum_falls_as_in_photographs() -> None:
    """The power of natural images falls with about 1/f²: a slope between -1.2 and -3.2 in log-log."""
    power = np.zeros((96, 96))
    for seed in range(6):
        grey = dead_leaves(seed, 96).mean(axis=2)
        power += np.abs(np.fft.fft2((grey - grey.mean()) * np.outer(np.hanning(96), np.hanning(96)))) ** 2
    frequency = np.hypot(np.fft.fftfreq(96)[:, None], np.fft.fftfreq(96)[None])
    band = (frequency > 0.03) & (frequency < 0.4)
    slope = np.polyfit(np.log(frequency[band]), np.log(power[band]), 1)[0]
    assert -3.2 < slope < -1.2
