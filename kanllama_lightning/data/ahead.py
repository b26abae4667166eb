"""Items that a thread makes before they are asked for."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")


class Ahead(Generic[T]):
    """The items of an endless iterator, in its order; `begin` lets a thread make the next one.

    What making an item raises is raised where it is asked for.

    Args:
        items: Used by one thread at a time, never by two at once.
    """

    def __init__(self, items: Iterator[T]) -> None:
        self._items = items
        self._coming: Future[T] | None = None
        self._thread: ThreadPoolExecutor | None = None

    def begin(self) -> None:
        """Let the next item be made meanwhile; once for each."""
        if self._coming is not None:
            return
        if self._thread is None:
            # made here and not before: a process may be forked in between, a thread is not
            self._thread = ThreadPoolExecutor(1, "text")
        self._coming = self._thread.submit(next, self._items)

    def __iter__(self) -> Iterator[T]:
        """The items."""
        return self

    def __next__(self) -> T:
        """The one that was begun, or another that is made now."""
        if self._coming is None:
            return next(self._items)
        coming, self._coming = self._coming, None
        return coming.result()
