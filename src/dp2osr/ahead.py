"""A thread beside the caller: it works on the next item, or puts away the last one, while the caller works on this."""

import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Generic, TypeVar

T = TypeVar("T")
_END: Any = object()


class Ahead(Generic[T]):
    """The items in their order, each made while its predecessor is in use; two are held at most.

    An exception is raised where its item would come. waited_s: seconds that the caller waited for items.
    """

    def __init__(self, items: Iterable[T]) -> None:
        self.waited_s = 0.0
        self._items = iter(items)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ahead")

    def __enter__(self) -> "Ahead[T]":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Wait for the item that is being made, and end the thread."""
        self._thread.shutdown()

    def __iter__(self) -> Iterator[T]:
        coming = self._thread.submit(next, self._items, _END)
        while True:
            start = time.perf_counter()
            item = coming.result()
            self.waited_s += time.perf_counter() - start
            if item is _END:
                return
            coming = self._thread.submit(next, self._items, _END)
            yield item


class Behind:
    """Work that is handed over is done in a thread, one piece after the other; at most one waits or is in hand."""

    def __init__(self) -> None:
        self._last: Future[None] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="behind")

    def __enter__(self) -> "Behind":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Let what was handed over be finished, and end the thread; raise its exception, unless one is on its way."""
        self._thread.shutdown()
        if error is None:
            self.wait()

    def do(self, work: Callable[..., None], *arguments: Any) -> None:
        """Hand over work, as soon as what was handed over before is done; raises that one's exception."""
        self.wait()
        self._last = self._thread.submit(work, *arguments)

    def wait(self) -> None:
        """Wait until what was handed over is done; raises its exception."""
        if self._last is not None:
            self._last.result()
