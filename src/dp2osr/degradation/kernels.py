"""Blur kernels of Real-ESRGAN and ResShift: Gaussian, generalized Gaussian, plateau and circular low-pass (sinc).

A kernel is a (size, size) float64 array of sum 1; sizes are odd, sigmas in pixels, angles in radians.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import j1

from dp2osr.config_degradation import BlurSettings

Kernel = NDArray[np.float64]
SMALL_SINC = 13  # under this size a sinc kernel is too small for cut-offs under π/3


def _offsets(size: int) -> tuple[Kernel, Kernel]:
    """Return x and y of each tap relative to the centre, (size, size)."""
    line = np.arange(size, dtype=np.float64) - size // 2
    x, y = np.meshgrid(line, line)
    return x, y


def _mahalanobis(size: int, sigma_x: float, sigma_y: float, rotation: float) -> Kernel:
    """Return pᵀ Σ⁻¹ p of each tap p, where Σ has axes sigma_x and sigma_y turned by `rotation`."""
    x, y = _offsets(size)
    cos, sin = math.cos(rotation), math.sin(rotation)
    return ((x * cos + y * sin) / sigma_x) ** 2 + ((y * cos - x * sin) / sigma_y) ** 2


def gaussian(size: int, sigma_x: float, sigma_y: float, rotation: float = 0.0, beta: float = 1.0) -> Kernel:
    """exp(-½ (pᵀ Σ⁻¹ p)^beta): a Gaussian for beta = 1, else a generalized one (flatter for beta > 1)."""
    kernel = np.exp(-0.5 * _mahalanobis(size, sigma_x, sigma_y, rotation) ** beta)
    return kernel / kernel.sum()


def plateau(size: int, sigma_x: float, sigma_y: float, rotation: float = 0.0, beta: float = 1.0) -> Kernel:
    """1 / (1 + (pᵀ Σ⁻¹ p)^beta): a plateau-shaped kernel with heavy tails."""
    kernel = 1.0 / (1.0 + _mahalanobis(size, sigma_x, sigma_y, rotation) ** beta)
    return kernel / kernel.sum()


def sinc(size: int, cutoff: float) -> Kernel:
    """Circular low-pass filter: ω J1(ω r) / (2π r) for the cut-off ω in radians a pixel, ω² / (4π) in the centre."""
    x, y = _offsets(size)
    radius = np.hypot(x, y)
    centre = size // 2
    radius[centre, centre] = 1.0  # replaced below
    kernel = cutoff * j1(cutoff * radius) / (2 * np.pi * radius)
    kernel[centre, centre] = cutoff**2 / (4 * np.pi)
    return kernel / kernel.sum()


def delta() -> Kernel:
    """Return the 1x1 kernel that leaves an image as it is."""
    return np.ones((1, 1))


def draw_sinc(rng: np.random.Generator, size_range: tuple[int, int], pad_to: int, low: float | None) -> dict[str, Any]:
    """Draw a sinc kernel's size and cut-off; `low` None is π/3 for sizes under 13, else π/5."""
    size = _odd(rng, size_range)
    if low is None:
        low = np.pi / 3 if size < SMALL_SINC else np.pi / 5
    return {"kind": "sinc", "size": size, "pad_to": pad_to, "cutoff": float(rng.uniform(low, np.pi))}


def draw(rng: np.random.Generator, settings: BlurSettings) -> dict[str, Any] | None:
    """Draw the parameters of a blur kernel, or None for no blur."""
    if rng.random() >= settings.probability:
        return None
    if rng.random() < settings.sinc_probability:
        return draw_sinc(rng, settings.size, settings.pad_to, None)
    mix = settings.mix.model_dump()
    kind = str(rng.choice(list(mix), p=list(mix.values())))
    sigma_x = float(rng.uniform(*settings.sigma))
    drawn = {"kind": kind, "size": _odd(rng, settings.size), "pad_to": settings.pad_to}
    drawn |= {"sigma_x": sigma_x, "sigma_y": sigma_x, "rotation": 0.0, "beta": 1.0}
    if kind.endswith("aniso"):
        drawn |= {"sigma_y": float(rng.uniform(*settings.sigma)), "rotation": float(rng.uniform(*settings.rotation))}
    if kind.startswith("generalized"):
        drawn["beta"] = _beta(rng, settings.beta_generalized)
    elif kind.startswith("plateau"):
        drawn["beta"] = _beta(rng, settings.beta_plateau)
    return drawn


def _odd(rng: np.random.Generator, span: tuple[int, int]) -> int:
    """Draw an odd size from the odd bounds of `span`, both included."""
    return span[0] + 2 * int(rng.integers(0, (span[1] - span[0]) // 2 + 1))


def _beta(rng: np.random.Generator, span: tuple[float, float]) -> float:
    """Draw a shape exponent: half of the draws below 1 (peaked), half above (flat), as published."""
    middle = min(max(1.0, span[0]), span[1])
    low, high = (span[0], middle) if rng.random() < 0.5 else (middle, span[1])
    return float(rng.uniform(low, high))


def build(drawn: dict[str, Any] | None) -> Kernel:
    """Return the kernel of drawn parameters, padded with zeros to its `pad_to`; None gives the identity."""
    if drawn is None:
        return delta()
    if drawn["kind"] == "sinc":
        kernel = sinc(drawn["size"], drawn["cutoff"])
    else:
        shape = plateau if drawn["kind"].startswith("plateau") else gaussian
        kernel = shape(drawn["size"], drawn["sigma_x"], drawn["sigma_y"], drawn["rotation"], drawn["beta"])
    return pad(kernel, drawn["pad_to"])


def pad(kernel: Kernel, size: int) -> Kernel:
    """Surround a kernel with zeros up to an odd `size`."""
    return np.pad(kernel, (size - kernel.shape[0]) // 2)


def stack(found: list[Kernel]) -> NDArray[np.float32]:
    """Stack kernels of unlike sizes to (B, k, k), k the largest, then cut the border that is zero in all."""
    size = max(kernel.shape[0] for kernel in found)
    stacked = np.stack([pad(kernel, size) for kernel in found]).astype(np.float32)
    used = np.argwhere(stacked.any(axis=0))
    reach = int(np.abs(used - size // 2).max())
    keep = slice(size // 2 - reach, size // 2 + reach + 1)
    return np.ascontiguousarray(stacked[:, keep, keep])
