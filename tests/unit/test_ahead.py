"""Items made ahead, work done behind: order, how many are held, errors in their place, and no thread that stays."""

import threading
from collections.abc import Iterator

import pytest

from dp2osr.ahead import Ahead, Behind


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


def test_work_behind_goes_on_beside_the_caller_one_piece_at_a_time() -> None:
    done: list[int] = []
    release = threading.Event()

    def work(number: int) -> None:
        assert release.wait(10)
        done.append(number)

    with Behind() as behind:
        behind.do(work, 0)
        assert done == []  # the caller goes on
        release.set()
        behind.do(work, 1)
        assert done[0] == 0  # the second begins when the first is done
        behind.wait()
        assert done == [0, 1]
        behind.do(work, 2)
    assert done == [0, 1, 2]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("behind")]


def fail(text: str) -> None:
    raise ValueError(text)


def test_an_error_of_work_behind_reaches_the_caller() -> None:
    with pytest.raises(ValueError, match="first"), Behind() as behind:
        behind.do(fail, "first")
        behind.do(fail, "never begun")
    with pytest.raises(ValueError, match="last"), Behind() as behind:
        behind.do(fail, "last")
    with pytest.raises(KeyError), Behind() as behind:  # the caller's own error goes before
        behind.do(fail, "hidden")
        raise KeyError


def test_what_was_handed_over_is_done_when_the_caller_stops() -> None:
    done: list[int] = []
    with pytest.raises(SystemExit), Behind() as behind:
        behind.do(done.append, 1)
        raise SystemExit(143)
    assert done == [1]
