"""Reads ahead in a thread, so that loading overlaps training."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, Full, Queue
from types import TracebackType
from typing import Generic, TypeVar

Item = TypeVar("Item")
_POLL_SECONDS = 0.1


@dataclass(frozen=True)
class _End:
    """The source ended, or failed."""

    error: BaseException | None


class Prefetcher(Iterator[Item], Generic[Item]):
    """Yields what `source` yields, in its order, made up to `depth` items ahead. A context manager.

    An exception of the source is raised where its item would have come. Leaving the context ends the thread; items
    that were read ahead are dropped, which loses nothing as long as the source's state is kept by who asks for items.
    """

    def __init__(self, source: Iterator[Item], depth: int = 4) -> None:
        self._source = source
        self._queue: Queue[Item | _End] = Queue(maxsize=depth)
        self._end: _End | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._read, name="prefetch", daemon=True)

    def __enter__(self) -> Prefetcher[Item]:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        with suppress(Empty):  # room for a put that waits
            self._queue.get_nowait()
        self._thread.join()

    def __next__(self) -> Item:
        if self._end is None:
            item = self._queue.get()
            if not isinstance(item, _End):
                return item
            self._end = item
        if self._end.error is not None:
            raise self._end.error
        raise StopIteration

    def _read(self) -> None:
        end = _End(None)
        try:
            for item in self._source:
                self._put(item)
                if self._stop.is_set():
                    return
        except BaseException as error:  # handed to the thread that asks for items
            end = _End(error)
        self._put(end)

    def _put(self, item: Item | _End) -> None:
        while not self._stop.is_set():
            with suppress(Full):
                self._queue.put(item, timeout=_POLL_SECONDS)
                return
