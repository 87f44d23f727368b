"""The process that forks the workers which make parts.

It has no other threads, which a fork could hang on, loads the tokenizer and its fast engine once, and forks: a worker
begins without importing or loading anything, and shares that memory.
"""

from __future__ import annotations

import gc
import mmap
import multiprocessing
import os
import threading
from collections.abc import Generator, Iterator
from concurrent.futures import CancelledError, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextvars import ContextVar
from multiprocessing.connection import Connection
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np

from neox_core.data.tokenization.part import load_before_fork, make_part
from neox_core.data.tokenization.part_settings import Done, PartRecord, PartSettings
from neox_core.data.tokenization.readers import InputFile
from tasks.tokenization.pool import Order, killed

_PROGRESS_SECONDS = 0.25
_Progress = np.ndarray[Any, np.dtype[np.int64]]
"""A Done per file, [files, 3], in memory that the forks share: each worker writes the rows of its files."""


def main(descriptor: int) -> None:
    """Take one order from the other end of a connection and fulfil it."""
    with Connection(descriptor) as parent:

        def send(answer: object) -> None:
            try:
                parent.send(answer)
            except OSError:  # the parent has ended, and with it the work
                os._exit(1)

        try:
            for answer in made_in_forks(parent.recv(), parent):
                send(answer)
        except Exception as error:  # all go to the parent, which reports it
            send(error)
    os._exit(0)  # nothing is left to do, and taking Python down piece by piece takes longer


def made_in_forks(order: Order, parent: Connection | None = None) -> Iterator[tuple[int, PartRecord] | Done]:
    """Make the parts of an order, the largest first, in forks of this process, which has no other thread.

    After a failure files that no worker has been given are left.

    Args:
        parent: is closed in the workers, else the death of this process would not show at its other end.

    Yields:
        (place in the order's files, record) for each part, and in between what has been done by now.

    Raises:
        DataError, ConfigError, StorageError: the first failure of a worker; finished parts are kept.
    """
    load_before_fork(order.settings)
    gc.freeze()  # collections would touch, and so copy, the pages that the forks share
    progress: _Progress = np.frombuffer(mmap.mmap(-1, 24 * len(order.files)), np.int64).reshape(-1, 3)
    failure: Exception | None = None
    finished = SimpleQueue[Future[PartRecord]]()
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(order.workers, context, initializer=_begin, initargs=(progress, parent)) as pool:
        largest_first = sorted(enumerate(order.files), key=lambda place: -place[1].size)
        places = {pool.submit(_make, i, file, order.settings, order.folder): i for i, file in largest_first}
        for future in places:
            future.add_done_callback(finished.put)
        for _ in places:
            future = yield from _next(finished, progress)
            try:
                record = future.result()
            except CancelledError:
                continue
            except Exception as error:
                if failure is None:
                    failure = killed(order.workers) if isinstance(error, BrokenProcessPool) else error
                    for pending in places:  # not by shutdown, which informs nobody who waits for them
                        pending.cancel()
            else:
                yield places[future], record
    if failure is not None:
        raise failure


def _next(finished: SimpleQueue[Future[PartRecord]], progress: _Progress) -> Generator[Done, None, Future[PartRecord]]:
    """The next part that is finished; meanwhile, what has been done by now."""
    while True:
        try:
            return finished.get(timeout=_PROGRESS_SECONDS)
        except Empty:
            yield Done(*progress.sum(axis=0).tolist())


_progress = ContextVar[_Progress]("progress")
"""Of a worker."""


def _begin(progress: _Progress, parent: Connection | None) -> None:
    """A worker ends with the fork server; otherwise it would wait for work for ever."""
    _progress.set(progress)
    gc.enable()
    if parent:
        parent.close()
    fork_server = multiprocessing.parent_process()
    assert fork_server is not None, "runs in a worker only"

    def watch() -> None:
        fork_server.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _make(place: int, file: InputFile, settings: PartSettings, folder: Path) -> PartRecord:
    def on_progress(done: Done) -> None:
        _progress.get()[place] = done

    return make_part(file, settings, folder, on_progress)
