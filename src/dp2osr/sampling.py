"""From an LR image to a restored one: control image, sampling, decoding and colour fix, in one place."""

import math
from collections.abc import Sequence

import torch
from torch.nn import functional

from dp2osr import colour
from dp2osr.config import SamplingSettings
from dp2osr.models import tiling
from dp2osr.models.backend import Backend, Embeddings


def images_control(lr: torch.Tensor, scale: int) -> torch.Tensor:
    """Return the control image: (B, 3, h, w) RGB in [0, 1] upsampled by bicubic to (B, 3, h·scale, w·scale)."""
    return functional.interpolate(lr.float(), scale_factor=scale, mode="bicubic", antialias=False).clamp(0, 1)


@torch.no_grad()
def restore(
    backend: Backend,
    branch: torch.nn.Module,
    lr: torch.Tensor,
    *,
    scale: int,
    embeddings: Embeddings,
    negative: Embeddings,
    seeds: Sequence[int],
    sampling: SamplingSettings,
    tile: int = 0,
    overlap: int = 0,
) -> torch.Tensor:
    """Sample one restoration of each LR image, its initial noise from its own seed.

    lr: (B, 3, h, w) RGB in [0, 1], repeated by the caller for several candidates of one image. embeddings: tensors
    whose first dimension is B. negative: the same of the negative prompt, for classifier-free guidance (guidance > 1).
    tile and overlap are pixels of the output, multiples of the latent factor; tile 0 is one pass over the whole image.
    Returns (B, 3, h·scale, w·scale) float32 RGB in [0, 1] on the device of `lr`.
    """
    upsampled = images_control(lr, scale)
    control = backend.prepare_control(upsampled)
    cells = {"tile": tile // backend.latent_factor, "overlap": overlap // backend.latent_factor}
    latents = backend.sample(branch, control, embeddings, negative, seeds, sampling, **cells)
    decoded = decode(backend, latents, tile=tile, overlap=overlap) if tile else backend.decode_latents(latents)
    return colour.fix(decoded.to(lr.device), upsampled, sampling.colour_fix)


def restore_whole(
    backend: Backend,
    branch: torch.nn.Module,
    lr: torch.Tensor,
    *,
    scale: int,
    embeddings: Embeddings,
    negative: Embeddings,
    seeds: Sequence[int],
    sampling: SamplingSettings,
    tile: int = 0,
) -> torch.Tensor:
    """Restore whole photographs of any size, by overlapping tiles where they are larger than a tile.

    tile: output pixels, 0 for the model's own size; otherwise as `restore`. LR is padded to the model's multiple.
    """
    multiple, factor = backend.size_multiple, backend.latent_factor
    tile = math.ceil((tile or backend.native_size) / multiple) * multiple
    height, width = (side * scale for side in lr.shape[2:])
    padded = pad(lr, multiple // math.gcd(multiple, scale))
    tiled = max(padded.shape[2:]) * scale > tile
    restored = restore(
        backend,
        branch,
        padded,
        scale=scale,
        embeddings=embeddings,
        negative=negative,
        seeds=seeds,
        sampling=sampling,
        tile=tile if tiled else 0,
        overlap=tile // 4 // factor * factor if tiled else 0,
    )
    return restored[:, :, :height, :width]


def pad(lr: torch.Tensor, multiple: int) -> torch.Tensor:
    """Pad (B, 3, h, w) at the right and bottom to multiples by reflection, by repeated edges where it is too small."""
    height, width = lr.shape[2:]
    bottom, right = -height % multiple, -width % multiple
    mode = "reflect" if bottom < height and right < width else "replicate"
    return functional.pad(lr, (0, right, 0, bottom), mode=mode) if bottom or right else lr


def decode(backend: Backend, latents: torch.Tensor, *, tile: int, overlap: int) -> torch.Tensor:
    """Decode (B, C, h, w) latents in tiles of `tile` output pixels, blended over `overlap` pixels by a feather."""
    factor = backend.latent_factor
    height, width = latents.shape[2:]
    image = torch.zeros(len(latents), 3, height * factor, width * factor, device=latents.device)
    weight = torch.zeros(height * factor, width * factor, device=latents.device)
    cells, shared = tile // factor, overlap // factor
    for top in tiling.starts(height, cells, shared):
        for left in tiling.starts(width, cells, shared):
            piece = backend.decode_latents(latents[:, :, top : top + cells, left : left + cells])
            rows, columns = piece.shape[2:]
            window = tiling.feather(rows, columns, overlap).to(piece)
            y, x = slice(top * factor, top * factor + rows), slice(left * factor, left * factor + columns)
            image[:, :, y, x] += piece * window
            weight[y, x] += window
    return image / weight
