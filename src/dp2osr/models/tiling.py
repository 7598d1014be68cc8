"""Overlapping windows with feathered blending (MultiDiffusion, Bar-Tal et al. 2023), for images of any size."""

from collections.abc import Callable

import torch


def starts(length: int, tile: int, overlap: int) -> list[int]:
    """Return the first cells of windows of `tile` cells that cover `length`, overlapping by at least `overlap`."""
    if length <= tile:
        return [0]
    stride = tile - overlap
    count = -(-(length - tile) // stride)
    return [round(index * (length - tile) / count) for index in range(count + 1)]


def feather(rows: int, columns: int, overlap: int) -> torch.Tensor:
    """Return weights (rows, columns) in (0, 1] that fall linearly towards the edges over `overlap` cells."""

    def ramp(length: int) -> torch.Tensor:
        distance = torch.arange(length).add(1.0)
        return torch.minimum(distance, distance.flip(0)).div(max(overlap, 1)).clamp(max=1.0)

    return ramp(rows)[:, None] * ramp(columns)


def tiled(height: int, width: int, tile: int) -> bool:
    """Return whether a plane of cells is computed in windows of `tile` cells; tile 0 is the whole plane at once."""
    return tile > 0 and (height > tile or width > tile)


def blend(
    window: Callable[[slice, slice], torch.Tensor], shape: torch.Size, *, tile: int, overlap: int
) -> torch.Tensor:
    """Return `window` of the whole (B, C, h, w) plane, computed in tiles where `tile` > 0 and the plane is larger."""
    height, width = shape[2:]
    if not tiled(height, width, tile):
        return window(slice(0, height), slice(0, width))
    total, weights = torch.zeros(()), torch.zeros(())
    for top in starts(height, tile, overlap):
        for left in starts(width, tile, overlap):
            rows, columns = slice(top, min(top + tile, height)), slice(left, min(left + tile, width))
            part = window(rows, columns)
            if total.ndim == 0:
                total = part.new_zeros((part.shape[0], part.shape[1], height, width))
                weights = part.new_zeros((height, width))
            mask = feather(rows.stop - rows.start, columns.stop - columns.start, overlap).to(part)
            total[:, :, rows, columns] += part * mask
            weights[rows, columns] += mask
    return total / weights
