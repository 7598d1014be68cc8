"""What would be computed several times alike, computed once.

Batches in which an image stands several times in a row: the HR or LR image beside all candidates of its group.
Modules that are called several times with the same inputs: by each step of sampling, by policy and reference.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn


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


@contextlib.contextmanager
def computed_once(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Within it each module computes its first call alone: later ones, with inputs of the same values, return that.

    For modules whose outputs need no gradient: they are computed without a graph.
    """
    own = {module: vars(module).get("forward") for module in modules}
    for module in own:
        vars(module)["forward"] = _first_call(module.forward)
    try:
        yield
    finally:
        for module, forward in own.items():
            if forward is None:
                del vars(module)["forward"]
            else:
                vars(module)["forward"] = forward


def _first_call(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that calls `forward` once, without a graph, and returns what it gave from then on."""
    found: list[Any] = []

    @torch.no_grad()
    def first(*inputs: Any, **named: Any) -> Any:
        if not found:
            found.append(forward(*inputs, **named))
        return found[0]

    return first
