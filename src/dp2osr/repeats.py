"""Batches in which an image stands several times in a row: the HR or LR image beside all candidates of its group."""

from collections.abc import Callable
from typing import Any

import torch


def once_an_image(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function of (B, C, H, W) that treats images apart: equal neighbours in the batch are computed once.

    It returns a tensor or a list of tensors with the batch as first dimension.
    """

    def wrapped(images: torch.Tensor, **options: Any) -> Any:
        new = (images[1:] != images[:-1]).flatten(1).any(dim=1)
        if bool(new.all()):
            return function(images, **options)
        first = torch.cat([new.new_ones(1), new])
        source = first.cumsum(0) - 1
        found = function(images[first], **options)
        return [part[source] for part in found] if isinstance(found, list) else found[source]

    return wrapped
