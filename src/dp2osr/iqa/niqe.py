"""NIQE with a pristine model of one's own: pyiqa's features and distance, any block size.

NIQE (Mittal et al., 2013) is the distance between two Gaussians over block features: one of pristine images, one of
the image at hand. pyiqa's wrapper fixes blocks of 96 px, which leaves a single block in a 96 px image.
Importing this module imports pyiqa.
"""

import io
import logging
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import scipy.io
import torch
from pyiqa.archs.func_util import diff_round, normalize_img_with_gauss
from pyiqa.archs.niqe_arch import NIQE, compute_feature
from pyiqa.archs.niqe_arch import niqe as niqe_distance
from pyiqa.matlab_utils import blockproc, fspecial, imfilter, imresize, nancov
from pyiqa.utils.color_util import to_y_channel
from pyiqa.utils.registry import ARCH_REGISTRY
from scipy.io.matlab import MatReadError

from dp2osr.errors import UserError
from dp2osr.resume import write_bytes

LOG = logging.getLogger("niqe")
NUM_FEATURES = 36  # 18 at each of two scales
PYIQA_BLOCK = 96  # pixels
_HEADER = 116  # bytes of free text at the head of a MATLAB 5 file, where scipy writes the date


def luma(images: torch.Tensor, color_space: str = "yiq") -> torch.Tensor:
    """Return the rounded luma that NIQE works on: (B, 3, H, W) RGB in [0, 1] to (B, 1, H, W) float64 in 0..255."""
    return diff_round(to_y_channel(images, 255, color_space)).to(torch.float64)


@ARCH_REGISTRY.register()
class BlockNIQE(NIQE):
    """pyiqa's NIQE with a block size; equal to it at 96 px."""

    def __init__(self, block_size: int = PYIQA_BLOCK, **options: object) -> None:
        super().__init__(**options)
        self.block_size = block_size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Score (B, 3, H, W) RGB in [0, 1]; returns (B,) float64, lower is better."""
        image = luma(x, self.color_space)
        mean = self.mu_pris_param.to(image).repeat(len(image), 1)
        covariance = self.cov_pris_param.to(image).repeat(len(image), 1, 1)
        return niqe_distance(image, mean, covariance, self.block_size, self.block_size).reshape(-1)


def block_features(image: torch.Tensor, *, block_size: int) -> torch.Tensor:
    """Return NIQE's features (N, 36) float64 of the N whole blocks of one luma image (1, 1, H, W) in 0..255."""
    height, width = (side // block_size * block_size for side in image.shape[-2:])
    image = image[..., :height, :width]
    half = imresize(image / 255.0, scale=0.5, antialiasing=True) * 255.0
    scales = [
        blockproc(normalize_img_with_gauss(scaled, padding="replicate"), [size, size], fun=compute_feature)[0]
        for scaled, size in ((image, block_size), (half, block_size // 2))
    ]
    return torch.cat(scales, dim=-1)


def block_sharpness(image: torch.Tensor, *, block_size: int) -> torch.Tensor:
    """Return the mean local deviation (N,) of each whole block of a luma image (1, 1, H, W), blocks as above."""
    height, width = (side // block_size * block_size for side in image.shape[-2:])
    image = image[..., :height, :width]
    window = fspecial(7, 7.0 / 6, 1).to(image)
    mean = imfilter(image, window, padding="replicate")
    deviation = (imfilter(image**2, window, padding="replicate") - mean**2).abs().sqrt()
    return blockproc(deviation, [block_size, block_size], fun=lambda block, _: block.mean(dim=(1, 2, 3)))[0]


def fit(images: Iterable[torch.Tensor], *, block_size: int, sharpness: float) -> tuple[np.ndarray, np.ndarray]:
    """Fit the pristine Gaussian to the blocks of HR images.

    images: (3, H, W) float32 RGB in [0, 1]; those smaller than a block are skipped and counted in the log.
    sharpness: blocks under this share of their image's sharpest block are left out; 0 keeps all.
    Returns mean (36,) and covariance (36, 36), float64.
    """
    kept, num_images, num_small = [], 0, 0
    for image in images:
        num_images += 1
        if min(image.shape[-2:]) < block_size:
            num_small += 1
            continue
        grey = luma(image[None].float())
        features = block_features(grey, block_size=block_size)
        sharp = block_sharpness(grey, block_size=block_size)
        kept.append(features[(sharp >= sharpness * sharp.max()) & ~features.isnan().any(dim=1)])
    blocks = torch.cat(kept) if kept else torch.empty(0, NUM_FEATURES, dtype=torch.float64)
    LOG.info("niqe: %d blocks of %d images, %d images too small", len(blocks), num_images, num_small)
    if len(blocks) < 2:
        raise UserError(f"niqe: found {len(blocks)} usable blocks of {block_size} px in {num_images} images, wanted 2")
    if len(blocks) <= NUM_FEATURES:
        LOG.warning("niqe: only %d blocks for %d features; the covariance is singular", len(blocks), NUM_FEATURES)
    return blocks.mean(dim=0).numpy(), nancov(blocks[None])[0].numpy()


def save(path: Path, mean: np.ndarray, covariance: np.ndarray, *, block_size: int) -> None:
    """Write the .mat that pyiqa's NIQE loads; the same model gives the same bytes."""
    buffer = io.BytesIO()
    model = {"mu_prisparam": mean[None], "cov_prisparam": covariance, "block_size": np.array([[block_size]])}
    scipy.io.savemat(buffer, model)
    text = b"MATLAB 5.0 MAT-file, NIQE pristine model"
    write_bytes(path, text.ljust(_HEADER) + buffer.getvalue()[_HEADER:])


def check(path: Path, *, block_size: int) -> None:
    """Raise UserError unless `path` is a model that was fitted with blocks of `block_size` (if it says its size)."""
    if not path.is_file():
        raise UserError(f"niqe model {path}: not found; it is made by the niqe stage")
    try:
        model = scipy.io.loadmat(path)
    except (MatReadError, ValueError, NotImplementedError, TypeError, EOFError) as error:
        raise UserError(f"niqe model {path}: no readable MATLAB 5 file ({error})") from None
    for key, size in (("mu_prisparam", NUM_FEATURES), ("cov_prisparam", NUM_FEATURES**2)):
        if key not in model or np.size(model[key]) != size:
            raise UserError(f"niqe model {path}: {key}: found {np.size(model.get(key, []))} numbers, wanted {size}")
    fitted = int(model["block_size"].item()) if "block_size" in model else PYIQA_BLOCK
    if fitted != block_size:
        raise UserError(f"niqe model {path}: fitted with blocks of {fitted} px, wanted {block_size}; run niqe again")
