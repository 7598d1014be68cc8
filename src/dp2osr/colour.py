"""Colour fix of a restored image against its LR image (AdaIN, wavelet), as StableSR and the authors' code use it."""

import torch
from torch.nn import functional


def adain(image: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Give each channel of `image` the mean and standard deviation of `reference`; both (B, 3, H, W) in [0, 1]."""
    mean, std = image.mean((2, 3), keepdim=True), image.std((2, 3), keepdim=True)
    wanted_mean, wanted_std = reference.mean((2, 3), keepdim=True), reference.std((2, 3), keepdim=True)
    return ((image - mean) / (std + 1e-5) * wanted_std + wanted_mean).clamp(0, 1)


def _low_band(image: torch.Tensor, levels: int = 5) -> torch.Tensor:
    """Return the à-trous low band after `levels` dilated 3×3 binomial blurs."""
    kernel = torch.tensor([1.0, 2.0, 1.0], device=image.device, dtype=image.dtype)
    kernel = (kernel[:, None] * kernel / 16).expand(image.shape[1], 1, 3, 3)
    for level in range(levels):
        radius = 2**level
        padded = functional.pad(image, (radius,) * 4, mode="replicate")
        image = functional.conv2d(padded, kernel, groups=image.shape[1], dilation=radius)
    return image


def wavelet(image: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Keep the high bands of `image`, take the low band of `reference`; both (B, 3, H, W) in [0, 1]."""
    return (image - _low_band(image) + _low_band(reference)).clamp(0, 1)


def fix(image: torch.Tensor, reference: torch.Tensor, kind: str) -> torch.Tensor:
    """Apply the colour fix `kind` (adain | wavelet | none) to (B, 3, H, W) RGB in [0, 1]."""
    if kind == "none":
        return image.clamp(0, 1)
    return {"adain": adain, "wavelet": wavelet}[kind](image, reference)
