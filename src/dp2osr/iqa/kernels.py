"""What pyiqa computes slowly on the CPU, computed faster to the same numbers.

No metric is rewritten: each function here stands in for one that a pyiqa module calls, while that metric runs, and
returns what it returns. All but `convolve` give the very same bits; `convolve` gives float64's last digits otherwise,
plus what pyiqa's window, rounded to float32, is off a product of two Gaussians (6e-10 of a weight).
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

PRODUCT = 1e-7  # a window is a product of two vectors if no weight is further off, relative to the largest


def convolve(filter2: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return pyiqa's filter2 with a window that is a product of two vectors applied as those, one after the other.

    torch has no fast float64 convolution: it copies the 121 neighbours of each pixel side by side. 22 shifted sums
    replace them.
    """

    def convolved(images: Tensor, window: Tensor, shape: str = "same") -> Tensor:
        vectors = factors(window[0, 0]) if shape == "valid" and len(window) == images.shape[1] == 1 else None
        if vectors is None or images.device.type != "cpu" or images.dtype != torch.float64:
            return filter2(images, window, shape)
        return _shifted_sum(_shifted_sum(images, vectors[0], dim=2), vectors[1], dim=3)

    return convolved


def factors(window: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return the vectors (h,) and (w,) whose outer product is the window (h, w), or None where there are none.

    They have the window's sums along both sides, so that a flat image stays exactly as it is.
    """
    root = window.sum().abs().sqrt()
    column, row = window.sum(dim=1) / root, window.sum(dim=0) / root
    off = (torch.outer(column, row) - window).abs().max()
    return (column, row) if bool(off <= PRODUCT * window.abs().max()) else None


def _shifted_sum(images: Tensor, weights: Tensor, *, dim: int) -> Tensor:
    """Convolve along one side, without the border."""
    first, *others = weights.tolist()
    length = images.shape[dim] - len(others)
    total = images.narrow(dim, 0, length) * first
    for at, weight in enumerate(others, start=1):
        total.add_(images.narrow(dim, at, length), alpha=weight)
    return total


def planar(view_as_real: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return torch.view_as_real whose result (…, 2) has all real parts in memory before all imaginary ones.

    FSIM takes the two apart a dozen times, which torch does several numbers at once where neighbours are of one kind.
    """

    def viewed(numbers: Tensor) -> Tensor:
        parts = torch.stack(view_as_real(numbers).unbind(dim=-1))
        return parts.movedim(0, -1)

    return viewed


def unpooled(avg_pool2d: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return avg_pool2d that gives the images themselves where one pixel is to be averaged."""

    def pooled(images: Tensor, *how: Any, **options: Any) -> Tensor:
        return images if how == (1,) and not options else avg_pool2d(images, *how, **options)

    return pooled


def one_for_all(zeros: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return torch.zeros that makes one row for the whole batch (B, orientations, 1, H, W).

    What FSIM adds to it is of its filters, not of an image, and torch broadcasts the row.
    """

    def made(*size: int, **options: Any) -> Tensor:
        return zeros(1, *size[1:], **options) if len(size) == 5 else zeros(*size, **options)

    return made


class Median(NamedTuple):
    """torch.median's result, but for the indices."""

    values: Tensor


def median(torch_median: Callable[..., Any]) -> Callable[..., Any]:
    """Return torch.median along the last dimension by numpy's selection, which compares several numbers at once."""

    def selected(values: Tensor, **options: Any) -> Any:
        if values.device.type != "cpu" or options != {"dim": -1, "keepdim": True}:
            return torch_median(values, **options)
        middle = (values.shape[-1] - 1) // 2
        array = np.partition(values.numpy(), middle, axis=-1)
        found = array[..., middle : middle + 1]
        found = np.where(np.isnan(array[..., middle:]).any(axis=-1, keepdims=True), math.nan, found)
        return Median(torch.from_numpy(found.astype(array.dtype, copy=False)))

    return selected


Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]
SSIM: dict[str, Wrap] = {"ssim_arch.filter2": convolve}
# By pyiqa's name of a metric: `module.function` of pyiqa.archs, a library's through the module that calls it.
KERNELS: dict[str, dict[str, Wrap]] = {
    "ssim": SSIM,
    "ms_ssim": SSIM,
    "fsim": {
        "fsim_arch.torch.view_as_real": planar,
        "fsim_arch.torch.nn.functional.avg_pool2d": unpooled,
        "fsim_arch.torch.zeros": one_for_all,
        "fsim_arch.torch.median": median,
    },
}
