"""Work on the next item in a thread, while the caller works on this one."""

import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
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
