"""The `degradation` section: from HR to LR, after ResShift."""

from typing import Self

from pydantic import model_validator

from dp2osr.strict import Count, Probability, Strict


def _ordered(pair: tuple[float, float]) -> tuple[float, float]:
    if pair[0] > pair[1]:
        raise ValueError(f"a range is [low, high], found {list(pair)}")
    return pair


class KernelMix(Strict):
    """Probabilities of the six Gaussian-like blur kernels; they sum to 1."""

    iso: Probability
    aniso: Probability
    generalized_iso: Probability
    generalized_aniso: Probability
    plateau_iso: Probability
    plateau_aniso: Probability

    @model_validator(mode="after")
    def _sums_to_one(self) -> Self:
        total = sum(self.model_dump().values())
        if abs(total - 1) > 1e-9:
            raise ValueError(f"kernel probabilities must sum to 1, found {total}")
        return self


class BlurSettings(Strict):
    """Blur kernels: sizes in pixels (odd), sigmas in pixels, rotation in radians."""

    probability: Probability
    size: tuple[int, int]
    pad_to: Count
    sinc_probability: Probability
    mix: KernelMix
    sigma: tuple[float, float]
    rotation: tuple[float, float]
    beta_generalized: tuple[float, float]
    beta_plateau: tuple[float, float]

    @model_validator(mode="after")
    def _check(self) -> Self:
        for pair in (self.size, self.sigma, self.rotation, self.beta_generalized, self.beta_plateau):
            _ordered(pair)
        if self.size[0] % 2 == 0 or self.size[1] % 2 == 0 or self.pad_to % 2 == 0 or self.size[1] > self.pad_to:
            raise ValueError(f"blur sizes are odd and at most pad_to={self.pad_to}, found {list(self.size)}")
        return self


class ResizeSettings(Strict):
    """Random resize: probabilities of up, down and keep, and the range of the scale factor."""

    up: Probability
    down: Probability
    keep: Probability
    scale: tuple[float, float]

    @model_validator(mode="after")
    def _check(self) -> Self:
        _ordered(self.scale)
        if abs(self.up + self.down + self.keep - 1) > 1e-9:
            raise ValueError(f"up + down + keep must be 1, found {self.up + self.down + self.keep}")
        return self


class NoiseSettings(Strict):
    """Gaussian sigma in 1/255 of the range, Poisson scale as in Real-ESRGAN."""

    gaussian_probability: Probability
    gaussian_sigma: tuple[float, float]
    poisson_scale: tuple[float, float]
    grey_probability: Probability


class DegradationOrder(Strict):
    """One blur, resize, noise, JPEG pass."""

    blur: BlurSettings
    resize: ResizeSettings
    noise: NoiseSettings
    jpeg_quality: tuple[int, int]


class FinalSettings(Strict):
    """The last step: resize to HR/scale with an optional sinc filter, and JPEG, in a random order of the two."""

    sinc_probability: Probability
    sinc_size: tuple[int, int]
    pad_to: Count
    jpeg_quality: tuple[int, int]


class DegradationSettings(Strict):
    """HR to LR: first order always, second order with its own probability, final always."""

    scale: Count
    first: DegradationOrder
    second_probability: Probability
    second: DegradationOrder
    final: FinalSettings
