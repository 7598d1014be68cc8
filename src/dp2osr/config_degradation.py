"""The `degradation` section: from HR to LR, after ResShift."""

from typing import Annotated, Self, TypeVar

from pydantic import AfterValidator, Field, model_validator

from dp2osr.strict import Count, Probability, Strict

Pair = TypeVar("Pair", tuple[int, int], tuple[float, float])


def _ordered(pair: Pair) -> Pair:
    if pair[0] > pair[1]:
        raise ValueError(f"a range is [low, high], found {list(pair)}")
    return pair


def _odd(pair: tuple[int, int]) -> tuple[int, int]:
    if pair[0] % 2 == 0 or pair[1] % 2 == 0:
        raise ValueError(f"kernel sizes are odd, found {list(pair)}")
    return pair


def _check_padding(size: tuple[int, int], pad_to: int) -> None:
    if pad_to % 2 == 0 or size[1] > pad_to:
        raise ValueError(f"pad_to is odd and no less than the largest size {size[1]}, found {pad_to}")


Positive = Annotated[float, Field(gt=0)]
Quality = Annotated[int, Field(ge=1, le=100)]
Span = Annotated[tuple[float, float], AfterValidator(_ordered)]
PositiveSpan = Annotated[tuple[Positive, Positive], AfterValidator(_ordered)]
QualitySpan = Annotated[tuple[Quality, Quality], AfterValidator(_ordered)]
SizeSpan = Annotated[tuple[Count, Count], AfterValidator(_ordered), AfterValidator(_odd)]


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
    size: SizeSpan
    pad_to: Count
    sinc_probability: Probability
    mix: KernelMix
    sigma: PositiveSpan
    rotation: Span
    beta_generalized: PositiveSpan
    beta_plateau: PositiveSpan

    @model_validator(mode="after")
    def _check(self) -> Self:
        _check_padding(self.size, self.pad_to)
        return self


class ResizeSettings(Strict):
    """Random resize: probabilities of up, down and keep, and the range of the scale factor."""

    up: Probability
    down: Probability
    keep: Probability
    scale: PositiveSpan

    @model_validator(mode="after")
    def _check(self) -> Self:
        if abs(self.up + self.down + self.keep - 1) > 1e-9:
            raise ValueError(f"up + down + keep must be 1, found {self.up + self.down + self.keep}")
        return self


class NoiseSettings(Strict):
    """Gaussian sigma in 1/255 of the range, Poisson scale as in Real-ESRGAN."""

    gaussian_probability: Probability
    gaussian_sigma: PositiveSpan
    poisson_scale: PositiveSpan
    grey_probability: Probability


class DegradationOrder(Strict):
    """One pass of blur, resize and noise."""

    blur: BlurSettings
    resize: ResizeSettings
    noise: NoiseSettings


class FirstOrder(DegradationOrder):
    """The first pass ends with JPEG; after the second, the JPEG of the final step is the next."""

    jpeg_quality: QualitySpan


class FinalSettings(Strict):
    """The last step: resize to HR/scale with an optional sinc filter, and JPEG, in a random order of the two."""

    sinc_probability: Probability
    sinc_size: SizeSpan
    pad_to: Count
    jpeg_quality: QualitySpan

    @model_validator(mode="after")
    def _check(self) -> Self:
        _check_padding(self.sinc_size, self.pad_to)
        return self


class DegradationSettings(Strict):
    """HR to LR: first order always, second order with its own probability, final always."""

    scale: Count
    first: FirstOrder
    second_probability: Probability
    second: DegradationOrder
    final: FinalSettings
