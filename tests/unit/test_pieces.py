"""Batches that shrink: results in order, the size remembered, and errors that have nothing to do with memory."""

import logging
from collections.abc import Sequence

import pytest
import torch

from dp2osr.errors import UserError
from dp2osr.pieces import Pieces

LOG = logging.getLogger("test")
CPU_SHORT = "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"


class Work:
    """Doubles numbers, at most `room` at once; `sizes` says how many it was given."""

    def __init__(self, room: int, error: Exception) -> None:
        self.room, self.error = room, error
        self.sizes: list[int] = []

    def __call__(self, numbers: Sequence[int]) -> list[int]:
        self.sizes.append(len(numbers))
        if len(numbers) > self.room:
            raise self.error
        return [2 * number for number in numbers]


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out\nof memory"), RuntimeError(CPU_SHORT), MemoryError()],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize(
    ("room", "sizes"), [(9, [8, 3]), (7, [8, 4, 4, 3]), (3, [8, 4, 2, 2, 2, 2, 2, 1]), (1, [8, 4, 2, *[1] * 11])]
)
def test_short_memory_halves(room: int, sizes: list[int], error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    pieces, work = Pieces(8, "numbers", LOG), Work(room, error)
    assert pieces.run(range(11), work) == list(range(0, 22, 2))
    assert work.sizes == sizes
    assert caplog.text.count("out of memory, going on with") == {9: 0, 7: 1, 3: 2, 1: 3}[room]
    pieces.run(range(8), work)
    assert max(work.sizes[len(sizes) :]) == pieces.size <= room  # it is remembered


def test_a_few_items_of_a_large_batch(caplog: pytest.LogCaptureFixture) -> None:
    pieces, work = Pieces(32, "numbers", LOG), Work(2, torch.OutOfMemoryError("CUDA out\nof memory"))
    assert pieces.run(range(3), work) == [0, 2, 4]
    assert pieces.size == 2 and "going on with 2 numbers at once (OutOfMemoryError: CUDA out of memory)" in caplog.text


def test_no_memory_for_one_is_one_error() -> None:
    with pytest.raises(UserError, match=r"out of memory with numbers one by one \(OutOfMemoryError: nothing left\)"):
        Pieces(4, "numbers", LOG).run(range(4), Work(0, torch.OutOfMemoryError("nothing left")))


def test_other_errors_are_raised_at_once() -> None:
    work = Work(0, RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes"):
        Pieces(4, "numbers", LOG).run(range(4), work)
    assert work.sizes == [4]
