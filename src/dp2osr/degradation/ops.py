"""Single degradation steps on RGB in [0, 1]. Random numbers come from numpy generators on the CPU, whatever the
device of the image, so that the same seed gives the same noise everywhere.
"""

import io

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image

from dp2osr.errors import UserError

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
RESIZE_MODES = ("area", "bilinear", "bicubic")


def filter2d(images: torch.Tensor, kernels: NDArray[np.float32]) -> torch.Tensor:
    """Filter each of (B, C, H, W) with its own kernel of (B, k, k), borders mirrored.

    Written as a sum of shifted images: it is faster than a grouped convolution at these sizes on a CPU, and its
    result for an image is the same to the bit whatever the batch, because zero taps add exactly nothing.
    """
    reach = kernels.shape[1] // 2
    height, width = images.shape[-2:]
    if reach >= min(height, width):
        raise UserError(
            f"blur kernel of {2 * reach + 1} px: image is {width}x{height}, wanted smaller kernels or more px"
        )
    padded = F.pad(images, [reach] * 4, mode="reflect") if reach else images
    weights = torch.from_numpy(kernels).to(images.device)[..., None, None, None]
    filtered = torch.zeros_like(images)
    for row, column in np.argwhere(kernels.any(axis=0)).tolist():
        filtered += padded[..., row : row + height, column : column + width] * weights[:, row, column]
    return filtered


def resize(image: torch.Tensor, size: tuple[int, int], mode: str) -> torch.Tensor:
    """Resize (3, H, W) to `size` = (height, width) by area, bilinear or bicubic interpolation, without anti-aliasing.

    The result may leave [0, 1] (bicubic overshoot); the next step clamps.
    """
    if mode not in RESIZE_MODES:
        raise ValueError(f"resize mode: found '{mode}', wanted one of {', '.join(RESIZE_MODES)}")
    return F.interpolate(image[None], size=size, mode=mode, align_corners=None if mode == "area" else False)[0]


def add_gaussian_noise(image: torch.Tensor, sigma: float, *, grey: bool, rng: np.random.Generator) -> torch.Tensor:
    """Add normal noise of `sigma` of 255 to (3, H, W), one value for the three channels where `grey`; clamped."""
    channels = 1 if grey else image.shape[0]
    noise = rng.standard_normal((channels, *image.shape[1:]), dtype=np.float32) * np.float32(sigma / 255)
    return (image + torch.from_numpy(noise).to(image.device)).clamp(0, 1)


def add_poisson_noise(image: torch.Tensor, scale: float, *, grey: bool, rng: np.random.Generator) -> torch.Tensor:
    """Add `scale` times the shot noise of (3, H, W), or of its luma to all channels where `grey`; clamped.

    As in Real-ESRGAN, a pixel of value x (of the image in 8 bit) counts Poisson(x · v) / v, where v is the number
    of distinct values in the image, rounded up to a power of two.
    """
    pixels = np.rint(image.clamp(0, 1).cpu().numpy().astype(np.float64) * 255)
    if grey:
        pixels = np.rint(np.tensordot(np.array(LUMA), pixels, axes=1))[None]
    values = 2.0 ** np.ceil(np.log2(np.unique(pixels).size))
    clean = pixels / 255
    noise = ((rng.poisson(clean * values) / values - clean) * scale).astype(np.float32)
    return (image + torch.from_numpy(noise).to(image.device)).clamp(0, 1)


def compress_jpeg(image: torch.Tensor, quality: int) -> torch.Tensor:
    """Pass (3, H, W) through Pillow's JPEG at `quality` (4:2:0 chroma): clamped and rounded to 8 bit before it."""
    array = image.clamp(0, 1).mul(255).round().byte().permute(1, 2, 0).cpu().numpy()
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="JPEG", quality=quality)
    with Image.open(buffer, formats=("JPEG",)) as decoded:
        found = torch.from_numpy(np.array(decoded))
    return found.to(image.device).permute(2, 0, 1).float().div(255)


def round_8bit(images: torch.Tensor) -> torch.Tensor:
    """Clamp to [0, 1] and round to multiples of 1/255."""
    return images.clamp(0, 1).mul(255).round().div(255)
