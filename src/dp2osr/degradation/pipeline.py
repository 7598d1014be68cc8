"""HR to LR by the first-order degradation of ResShift, with the second order as an option (method.md, LR synthesis).

`sample_parameters` draws everything from one seed; `apply` is then a function of image and parameters alone.
"""

from typing import Any

import numpy as np
import torch

from dp2osr import seeds as seeding
from dp2osr.config_degradation import (
    DegradationOrder,
    DegradationSettings,
    FinalSettings,
    NoiseSettings,
    ResizeSettings,
)
from dp2osr.degradation import kernels, ops

Parameters = dict[str, Any]
JPEG_LAST = "resize_then_jpeg"
JPEG_FIRST = "jpeg_then_resize"


def degrade(
    hr: torch.Tensor, *, settings: DegradationSettings, seeds: list[int]
) -> tuple[torch.Tensor, list[Parameters]]:
    """Degrade a batch, one seed an image; an image's result does not depend on its batch.

    hr: (B, 3, H, W) float32 RGB in [0, 1] on any device. Returns lr (B, 3, H/scale, W/scale) float32 with 8-bit
    values in [0, 1] on the same device, and the drawn parameters, ready for JSON.
    """
    parameters = [sample_parameters(settings, seed) for seed in seeds]
    return apply(hr, parameters), parameters


def sample_parameters(settings: DegradationSettings, seed: int) -> Parameters:
    """Draw all parameters of one image's degradation; JSON-able."""
    rng = np.random.default_rng(seed)
    second = rng.random() < settings.second_probability
    return {
        "seed": seed,
        "scale": settings.scale,
        "first": _sample_order(settings.first, rng)
        | {"jpeg_quality": _sample_quality(settings.first.jpeg_quality, rng)},
        "second": _sample_order(settings.second, rng) if second else None,
        "final": _sample_final(settings.final, rng),
    }


def _sample_order(settings: DegradationOrder, rng: np.random.Generator) -> Parameters:
    return {
        "blur": kernels.draw(rng, settings.blur),
        "resize": _sample_resize(settings.resize, rng),
        "noise": _sample_noise(settings.noise, rng),
    }


def _sample_resize(settings: ResizeSettings, rng: np.random.Generator) -> Parameters:
    direction = str(rng.choice(("up", "down", "keep"), p=(settings.up, settings.down, settings.keep)))
    low, high = settings.scale
    span = {"up": (max(1.0, low), max(1.0, high)), "down": (min(1.0, low), min(1.0, high)), "keep": (1.0, 1.0)}
    factor = float(rng.uniform(*span[direction]))
    return {"direction": direction, "factor": factor, "mode": str(rng.choice(ops.RESIZE_MODES))}


def _sample_noise(settings: NoiseSettings, rng: np.random.Generator) -> Parameters:
    grey = bool(rng.random() < settings.grey_probability)
    if rng.random() < settings.gaussian_probability:
        return {"kind": "gaussian", "sigma": float(rng.uniform(*settings.gaussian_sigma)), "grey": grey}
    return {"kind": "poisson", "scale": float(rng.uniform(*settings.poisson_scale)), "grey": grey}


def _sample_quality(span: tuple[int, int], rng: np.random.Generator) -> int:
    return int(rng.integers(span[0], span[1] + 1))


def _sample_final(settings: FinalSettings, rng: np.random.Generator) -> Parameters:
    has_sinc = rng.random() < settings.sinc_probability
    return {
        "order": str(rng.choice((JPEG_LAST, JPEG_FIRST))),
        "mode": str(rng.choice(ops.RESIZE_MODES)),
        "sinc": kernels.draw_sinc(rng, settings.sinc_size, settings.pad_to, np.pi / 3) if has_sinc else None,
        "jpeg_quality": _sample_quality(settings.jpeg_quality, rng),
    }


def apply(hr: torch.Tensor, parameters: list[Parameters]) -> torch.Tensor:
    """Degrade (B, 3, H, W) by drawn parameters, one set an image. Returns (B, 3, H/scale, W/scale), see `degrade`."""
    if len(parameters) != hr.shape[0]:
        raise ValueError(f"parameters: found {len(parameters)}, wanted one for each of {hr.shape[0]} images")
    scale = parameters[0]["scale"]
    small = hr.shape[-2] // scale, hr.shape[-1] // scale
    blurred = _blur(hr, [drawn["first"]["blur"] for drawn in parameters])
    images = [
        _apply_orders(image, drawn, full=tuple(hr.shape[-2:]), small=small)
        for image, drawn in zip(blurred, parameters, strict=True)
    ]
    finals = [drawn["final"] for drawn in parameters]
    images = [
        ops.resize(_jpeg_if(image, final, JPEG_FIRST), small, final["mode"])
        for image, final in zip(images, finals, strict=True)
    ]
    filtered = _blur(torch.stack(images), [final["sinc"] for final in finals])
    images = [_jpeg_if(image, final, JPEG_LAST) for image, final in zip(filtered, finals, strict=True)]
    return ops.round_8bit(torch.stack(images))


def _blur(images: torch.Tensor, drawn: list[Parameters | None]) -> torch.Tensor:
    return ops.filter2d(images, kernels.stack([kernels.build(kernel) for kernel in drawn]))


def _jpeg_if(image: torch.Tensor, final: Parameters, order: str) -> torch.Tensor:
    return ops.compress_jpeg(image, final["jpeg_quality"]) if final["order"] == order else image


def _apply_orders(
    image: torch.Tensor, drawn: Parameters, *, full: tuple[int, ...], small: tuple[int, int]
) -> torch.Tensor:
    """Resize, noise and JPEG of the first order (`image` is blurred already), then the second order where drawn."""
    image = _resize_noise(image, drawn["first"], base=full, seed=seeding.derive(drawn["seed"], "noise", 1))
    image = ops.compress_jpeg(image, drawn["first"]["jpeg_quality"])
    if drawn["second"] is None:
        return image
    image = _blur(image[None], [drawn["second"]["blur"]])[0]
    return _resize_noise(image, drawn["second"], base=small, seed=seeding.derive(drawn["seed"], "noise", 2))


def _resize_noise(image: torch.Tensor, order: Parameters, *, base: tuple[int, ...], seed: int) -> torch.Tensor:
    """Resize to `base` (height, width) times the drawn factor, add noise."""
    factor, noise = order["resize"]["factor"], order["noise"]
    size = max(1, int(base[0] * factor)), max(1, int(base[1] * factor))
    image = ops.resize(image, size, order["resize"]["mode"])
    rng = np.random.default_rng(seed)
    if noise["kind"] == "gaussian":
        return ops.add_gaussian_noise(image, noise["sigma"], grey=noise["grey"], rng=rng)
    return ops.add_poisson_noise(image, noise["scale"], grey=noise["grey"], rng=rng)
