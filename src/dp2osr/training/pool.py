"""The pool of HR/LR pairs that pretraining draws its crops from."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from dp2osr import seeds
from dp2osr.config import DatasetSettings, PretrainSettings
from dp2osr.config_degradation import DegradationSettings
from dp2osr.degradation import pipeline
from dp2osr.stage import progress

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pool:
    """hr (N, 3, S, S), lr (N, 3, S/scale, S/scale) uint8; `photograph` (N,) bool: which are no procedural images."""

    hr: torch.Tensor
    lr: torch.Tensor
    photograph: torch.Tensor


def build(
    sources: Sequence[tuple[np.ndarray, bool]],
    degradation: DegradationSettings,
    *,
    size: int,
    count: int,
    procedural_share: float,
    seed: int,
) -> Pool:
    """Draw `count` augmented crops of `size` pixels and degrade them.

    sources: (H, W, 3) uint8 and whether it is a photograph. Photographs are zoomed out by 1 to 4, procedural images
    (which are busier than the world) zoomed in or out by up to 2.
    """
    photos = [array for array, photograph in sources if photograph]
    leaves = [array for array, photograph in sources if not photograph]
    hr, lr, kinds = [], [], []
    chunk = 256
    for first in progress(range(0, count, chunk), -(-count // chunk), "pool", log):
        numbers = range(first, min(first + chunk, count))
        crops = []
        for number in numbers:
            rng = np.random.default_rng(seeds.derive(seed, "pool", number))
            photograph = not leaves or (bool(photos) and rng.random() >= procedural_share)
            array = (photos if photograph else leaves)[rng.integers(len(photos if photograph else leaves))]
            zoom = rng.uniform(1, 4) if photograph else 2.0 ** rng.uniform(-1, 0.5)
            crops.append(_augment(_crop(array, size, zoom, rng), rng))
            kinds.append(photograph)
        batch = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).contiguous()
        drawn = [seeds.derive(seed, "pool-degrade", number) for number in numbers]
        degraded, _ = pipeline.degrade(batch.float() / 255, settings=degradation, seeds=drawn)
        hr.append(batch)
        lr.append((degraded * 255).round().byte())
    return Pool(torch.cat(hr), torch.cat(lr), torch.tensor(kinds))


def draw(
    sources: Sequence[tuple[np.ndarray, bool]], dataset: DatasetSettings, settings: PretrainSettings, *, seed: int
) -> Pool:
    """Build the pool that the settings ask for."""
    return build(
        sources,
        dataset.degradation,
        size=dataset.hr_size,
        count=settings.pool_size,
        procedural_share=settings.procedural_share,
        seed=seed,
    )


def _crop(array: np.ndarray, size: int, zoom: float, rng: np.random.Generator) -> np.ndarray:
    height, width = array.shape[:2]
    side = min(max(round(size * zoom), 8), height, width)
    left, top = rng.integers(width - side + 1), rng.integers(height - side + 1)
    image = Image.fromarray(array[top : top + side, left : left + side])
    return np.asarray(image.resize((size, size), Image.Resampling.LANCZOS))


def _augment(array: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Turn and flip; half of the time change gamma, gains and the order of channels."""
    array = np.rot90(array, int(rng.integers(4)))
    if rng.random() < 0.5:
        array = array[:, ::-1]
    if rng.random() < 0.5:
        gamma, gains = 2.0 ** rng.uniform(-0.5, 0.5), rng.uniform(0.8, 1.0, 3)
        values = (array / 255.0) ** gamma * gains
        array = (values[..., rng.permutation(3)] * 255).round().astype(np.uint8)
    return np.ascontiguousarray(array)
