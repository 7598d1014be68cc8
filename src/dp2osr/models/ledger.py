"""Bytes that torch code allocates on a GPU, counted on the `meta` device, where nothing is computed and nothing held.

Every operation on meta tensors makes tensors of the right shape and dtype without data; the ledger adds the size of
their storages when they appear and takes it off when they die, as a GPU's allocator would.
"""

import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

# What CUDA's autocast runs in the lower precision, and in float32, of what the networks here call.
LOWER = frozenset({functional.linear, functional.conv2d, torch.matmul, torch.bmm, torch.baddbmm})
FULL = frozenset({functional.layer_norm, functional.group_norm, functional.rms_norm, functional.interpolate})
ATTENTION = functional.scaled_dot_product_attention


class Ledger(TorchDispatchMode):
    """Bytes alive now and at the most, of storages that appear while it is entered; `known` ones do not count."""

    def __init__(self, known: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.alive = self.most = 0
        self._known = list(known)  # kept, so that no new storage can take the place of one
        self._seen: dict[int, Any] = {tensor.untyped_storage()._cdata: None for tensor in self._known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(found):
            if isinstance(leaf, torch.Tensor):
                self._add(leaf.untyped_storage())
        return found

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self._seen[key] = weakref.ref(storage, lambda _: self._remove(key, size))
        self.alive += size
        self.most = max(self.most, self.alive)

    def _remove(self, key: int, size: int) -> None:
        self._seen.pop(key, None)
        self.alive -= size


class LikeGpu(TorchFunctionMode):
    """What a GPU does and `meta` does not: kernels that keep little for backward, and mixed precision in `lower`.

    `lower` None: every tensor keeps its dtype. Casts of trainable weights are kept during a forward pass, as autocast
    keeps them; `forget` ends that.
    """

    def __init__(self, lower: torch.dtype | None) -> None:
        super().__init__()
        self._lower = lower
        self._casts: dict[int, torch.Tensor] | None = {}

    def forget(self) -> None:
        """Drop the kept casts; backward keeps those that it needs."""
        self._casts = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        wanted = None
        if self._lower is not None:
            wanted = self._lower if func in LOWER or func is ATTENTION else torch.float32 if func in FULL else None
        if wanted is not None:
            args = [self._cast(value, wanted) for value in args]
            kwargs = {name: self._cast(value, wanted) for name, value in kwargs.items()}
        return KERNELS.get(func, func)(*args, **kwargs)

    def _cast(self, value: Any, dtype: torch.dtype) -> Any:
        if not isinstance(value, torch.Tensor) or not value.is_floating_point() or value.dtype == dtype:
            return value
        if self._casts is None or not (value.is_leaf and value.requires_grad):
            return value.to(dtype)
        return self._casts.setdefault(id(value), value.to(dtype))


def fused_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Return attention (B, heads, tokens, width) by a kernel that keeps queries, keys, values, output and log sums."""
    assert not enable_gqa
    sums = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value))
    kernel = torch.ops.aten._scaled_dot_product_efficient_attention
    return kernel(query, key, value, attn_mask, sums, dropout_p, is_causal, scale=scale)[0]


class RmsNorm(torch.autograd.Function):
    """Shapes of the kernel that keeps its input and one number a row."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x, weight, x.new_empty((*x.shape[:-1], 1)))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), None if weight is None else torch.empty_like(weight)


def fused_rms_norm(
    x: torch.Tensor, shape: Sequence[int], weight: torch.Tensor | None = None, eps: float | None = None
) -> torch.Tensor:
    """Return x normalised over its last dimension, as far as `meta` goes: its shape."""
    assert len(shape) == 1
    result: torch.Tensor = RmsNorm.apply(x, weight)
    return result


KERNELS = {ATTENTION: fused_attention, functional.rms_norm: fused_rms_norm}


def recomputing(lower: torch.dtype | None) -> Callable[..., Any]:
    """Return a checkpoint function whose recomputation, too, is as on a GPU: backward itself runs outside of modes."""

    def contexts() -> tuple[AbstractContextManager[None], LikeGpu]:
        again = LikeGpu(lower)
        again.forget()
        return nullcontext(), again

    return partial(checkpoint, use_reentrant=False, context_fn=contexts)


def weights(*modules: nn.Module) -> list[torch.Tensor]:
    """Return all parameters and buffers."""
    return [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]


def forward_bytes(work: Callable[[], Any], *, known: Iterable[torch.Tensor]) -> int:
    """Return the most bytes that `work` holds at a time beside `known`, without a graph."""
    with torch.no_grad(), LikeGpu(None), Ledger(known) as ledger:
        found = work()
        del found
    return ledger.most


def backward_bytes(
    work: Callable[[], torch.Tensor], *, known: Iterable[torch.Tensor], lower: torch.dtype | None
) -> tuple[int, int]:
    """Return (bytes that the graph of `work` keeps for backward, the most bytes in forward and backward together)."""
    with LikeGpu(lower) as gpu, Ledger(known) as ledger:
        loss = work().float().square().mean()
        gpu.forget()
        kept = ledger.alive
        loss.backward()
    return kept, ledger.most
