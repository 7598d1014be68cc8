"""Items made ahead: their order, how many are held, errors in their place, and no thread that stays."""

import threading
from collections.abc import Iterator

import pytest

from dp2osr.ahead import Ahead


def test_items_come_in_order_and_one_is_made_ahead() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for number in range(6):
            assert threading.current_thread() is not threading.main_thread()
            made.append(number)
            yield number

    with Ahead(items()) as ahead:
        for number in ahead:
            assert len(made) <= number + 2
    assert made == list(range(6)) and ahead.waited_s >= 0
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ahead")]


def test_an_error_comes_where_its_item_would() -> None:
    def items() -> Iterator[int]:
        yield 1
        yield 2
        raise ValueError("third")

    seen = []
    with pytest.raises(ValueError, match="third"), Ahead(items()) as ahead:
        seen.extend(ahead)  # what came before is kept
    assert seen == [1, 2]


def test_leaving_early_ends_the_thread() -> None:
    with Ahead(iter(range(1000))) as ahead:
        assert next(iter(ahead)) == 0
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ahead")]


def test_nothing_to_make() -> None:
    with Ahead(()) as ahead:
        assert list(ahead) == []
