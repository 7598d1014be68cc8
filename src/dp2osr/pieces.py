"""Batches that shrink where memory is short, on a GPU or not."""

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from dp2osr.errors import UserError, in_one_line

T = TypeVar("T")
R = TypeVar("R")

# What libraries say, other than torch.OutOfMemoryError and MemoryError, where memory is short.
OUT_OF_MEMORY = ("can't allocate memory", "DefaultCPUAllocator", "CUDA out of memory", "STATUS_ALLOC_FAILED")


def out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory was short."""
    import torch

    told = isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY)
    return told or isinstance(error, torch.OutOfMemoryError | MemoryError)


def release() -> None:
    """Give back to the GPU what torch keeps for later: in pieces that may be too small for anything else."""
    import torch

    torch.cuda.empty_cache()  # nothing where CUDA was never used


class Pieces:
    """How many items are computed at once: `size` at first, half of it when memory is short, and so from then on.

    For work whose result does not depend on how its items are cut, other than by rounding.
    """

    def __init__(self, size: int, what: str, log: logging.Logger) -> None:
        """what: the items' name in messages, in the plural."""
        self.size = size
        self._what, self._log = what, log

    def run(self, items: Sequence[T], work: Callable[[Sequence[T]], Iterable[R]]) -> list[R]:
        """Return the results of `work`, one an item; raises UserError where there is no memory for a single one."""
        done: list[R] = []
        while len(done) < len(items):
            done += self._attempt(items[len(done) : len(done) + self.size], work)
        return done

    def _attempt(self, piece: Sequence[T], work: Callable[[Sequence[T]], Iterable[R]]) -> Iterable[R]:
        try:
            return work(piece)
        except Exception as error:
            if not out_of_memory(error):
                raise
            reason = in_one_line(error)
            if self.size == 1:
                raise UserError(f"out of memory with {self._what} one by one ({reason})") from error
        # The error is gone here, and with it what its frames hold.
        self.size //= 2
        self._log.warning("out of memory, going on with %d %s at once (%s)", self.size, self._what, reason)
        release()
        return []
