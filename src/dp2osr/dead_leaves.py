"""Procedural training images after the dead-leaves model: occluding leaves whose radii follow a power law.

Edges at every scale and orientation, natural colour statistics and 1/f textures make them a stand-in for photographs.
"""

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Floats: TypeAlias = NDArray[np.float32]

OVERSAMPLING = 2  # rendered that much larger and area-averaged: anti-aliased edges
COVERAGE = 3.0  # mean number of leaves over a pixel
MAX_LEAVES = 900
# Rows: luma, blue-yellow, red-green; natural images vary in this order (a rounded PCA of their RGB values).
COLOUR_AXES = np.array([[0.58, 0.58, 0.58], [0.71, 0.0, -0.71], [0.41, -0.82, 0.41]], dtype=np.float32)


def dead_leaves(seed: int, size: int = 192) -> NDArray[np.uint8]:
    """Render one image of opaque leaves; equal seeds give equal images. Returns (size, size, 3) uint8 RGB."""
    rng = np.random.default_rng(seed)
    width = size * OVERSAMPLING
    noise = _pink_noise(rng, width)
    image = np.empty((width, width, 3), dtype=np.float32)
    mood = _mood(rng)
    whole = (slice(0, width), slice(0, width))
    image[:] = _shade(rng, *_local(whole, width / 2, width / 2, 0.0), float(width), noise, mood)
    for radius in _radii(rng, width):
        _paint_leaf(rng, image, radius, noise, mood)
    averaged = image.reshape(size, OVERSAMPLING, size, OVERSAMPLING, 3).mean(axis=(1, 3))
    return np.rint(averaged.clip(0, 1) * 255).astype(np.uint8)


def _radii(rng: np.random.Generator, width: int) -> NDArray[np.float64]:
    """Draw radii in rendered pixels from a density of 1/r³ on [low, high], as many as give COVERAGE."""
    low = width * np.exp(rng.uniform(np.log(0.008), np.log(0.04)))
    high = width * rng.uniform(0.2, 0.45)
    span = low**-2 - high**-2
    mean_area = np.pi * 2 * np.log(high / low) / span
    count = min(MAX_LEAVES, int(COVERAGE * width**2 / mean_area))
    return (low**-2 - rng.random(count) * span) ** -0.5


def _mood(rng: np.random.Generator) -> Floats:
    """Draw what the colours of one image share: rows are the mean and the deviations along COLOUR_AXES."""
    mean = np.array([rng.uniform(0.45, 1.1), rng.normal(0, 0.08), rng.normal(0, 0.03)])
    deviation = np.array([rng.uniform(0.25, 0.5), rng.uniform(0.02, 0.16), rng.uniform(0.01, 0.07)])
    return np.stack([mean, deviation]).astype(np.float32)


def _pink_noise(rng: np.random.Generator, width: int) -> Floats:
    """Return (width, width) noise of amplitude 1/f, mean 0 and standard deviation 1; it tiles."""
    spectrum = np.fft.rfft2(rng.standard_normal((width, width), dtype=np.float32))
    frequency = np.hypot(np.fft.fftfreq(width)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = np.inf
    noise = np.fft.irfft2(spectrum / frequency, s=(width, width))
    return (noise / noise.std()).astype(np.float32)


def _local(box: tuple[slice, slice], cx: float, cy: float, angle: float) -> tuple[Floats, Floats]:
    """Return the coordinates of the pixels of `box` relative to (cx, cy), turned by `angle`."""
    dy = (np.arange(box[0].start, box[0].stop, dtype=np.float32) + np.float32(0.5 - cy))[:, None]
    dx = (np.arange(box[1].start, box[1].stop, dtype=np.float32) + np.float32(0.5 - cx))[None]
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return dx * cos + dy * sin, dy * cos - dx * sin


def _paint_leaf(rng: np.random.Generator, image: Floats, radius: float, noise: Floats, mood: Floats) -> None:
    """Draw a shape, a place and a texture, and paint it over `image` in place."""
    width = image.shape[0]
    cx, cy, angle = rng.uniform(0, width), rng.uniform(0, width), rng.uniform(-np.pi, np.pi)
    kind = rng.choice(("disc", "ellipse", "polygon", "bar"), p=(0.25, 0.25, 0.35, 0.15))
    reach = radius * (3.0 if kind == "bar" else 1.45 if kind == "polygon" else 1.0)
    rows = slice(max(0, int(cy - reach)), min(width, int(cy + reach) + 1))
    columns = slice(max(0, int(cx - reach)), min(width, int(cx + reach) + 1))
    u, v = _local((rows, columns), cx, cy, angle)
    inside = _shape(rng, str(kind), u, v, radius)
    shade = _shade(rng, u, v, radius, noise, mood)
    np.copyto(image[rows, columns], shade, where=inside[..., None])


def _shape(rng: np.random.Generator, kind: str, u: Floats, v: Floats, radius: float) -> NDArray[np.bool_]:
    """Return which pixels (by local coordinates) the leaf covers."""
    if kind == "disc":
        return u * u + v * v <= radius**2
    if kind == "ellipse":
        return u * u + (v / np.float32(rng.uniform(0.3, 0.9))) ** 2 <= radius**2
    if kind == "bar":
        return (np.abs(u) <= radius * rng.uniform(1.0, 2.8)) & (np.abs(v) <= radius * rng.uniform(0.08, 0.4))
    sides = int(rng.integers(3, 7))
    turns = (np.arange(sides) + rng.uniform(-0.2, 0.2, sides)) * 2 * np.pi / sides
    inside = u * u + v * v <= (1.45 * radius) ** 2
    for turn, distance in zip(turns, radius * rng.uniform(0.6, 1.0, sides), strict=True):
        inside &= u * np.float32(np.cos(turn)) + v * np.float32(np.sin(turn)) <= distance
    return inside


def _shade(rng: np.random.Generator, u: Floats, v: Floats, radius: float, noise: Floats, mood: Floats) -> Floats:
    """Return the leaf's own colours (h, w, 3): a natural colour, a linear gradient and a texture along one tint."""
    colour = (mood[0] + mood[1] * rng.standard_normal(3).astype(np.float32)) @ COLOUR_AXES
    turn = rng.uniform(-np.pi, np.pi)
    along = u * np.float32(np.cos(turn)) + v * np.float32(np.sin(turn))
    light = along * np.float32(rng.normal(0, 0.12) / radius)
    light += _texture(rng, along, noise)
    tint = np.array([1.0, rng.normal(0, 0.15), rng.normal(0, 0.05)], dtype=np.float32) @ COLOUR_AXES * np.float32(1.7)
    shaded: Floats = colour.clip(0.02, 0.98) + light[..., None] * tint
    return shaded


def _texture(rng: np.random.Generator, along: Floats, noise: Floats) -> Floats | float:
    """Return a texture around 0 for the pixels of a leaf: none, 1/f noise, stripes or grain."""
    height, width = along.shape
    kind = rng.choice(("none", "cloud", "stripes", "grain"), p=(0.25, 0.35, 0.25, 0.15))
    strength = np.float32(rng.uniform(0.02, 0.15))
    if kind == "cloud":
        top, left = rng.integers(0, noise.shape[0] - height + 1), rng.integers(0, noise.shape[1] - width + 1)
        return noise[top : top + height, left : left + width] * strength
    if kind == "stripes":
        wave = np.sin(along * np.float32(2 * np.pi / (OVERSAMPLING * np.exp(rng.uniform(np.log(3), np.log(24))))))
        return (np.sign(wave) if rng.random() < 0.4 else wave) * strength * np.float32(1.5)
    if kind == "grain":
        return rng.standard_normal((height, width), dtype=np.float32) * strength
    return 0.0
