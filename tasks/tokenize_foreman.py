"""The process that forks the workers which make parts.

It is started afresh, so that it has no threads that a fork could hang on, loads the tokenizer and its fast engine once,
and forks: a worker begins without importing or loading anything, and shares that memory.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import threading
from concurrent.futures import CancelledError, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection

from neox_core.data.part import load_before_fork, make_part
from neox_core.errors import DataError
from tasks.tokenize_pool import Order


def main(descriptor: int) -> None:
    """Take one order from the other end of a connection and fulfil it."""
    with Connection(descriptor) as parent:
        order: Order = parent.recv()
        try:
            load_before_fork(order.settings)
            failure = _make(order, parent)
        except Exception as error:  # all go to the parent, which knows what to tell
            failure = error
        if failure is not None:
            parent.send(failure)
    os._exit(0)  # nothing is left to do, and taking Python down piece by piece takes longer


def _make(order: Order, parent: Connection) -> Exception | None:
    """Send what is made; after a failure, which is returned, files that no worker has been given are left."""
    failure: Exception | None = None
    gc.freeze()  # with gc.disable at the start: collections would touch, and so copy, the pages that the forks share
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(order.workers, context, initializer=_begin, initargs=(parent,)) as pool:
        futures = {pool.submit(make_part, f, order.settings, order.folder): i for i, f in enumerate(order.files)}
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()  # after the forks
        for future in as_completed(futures):
            try:
                record = future.result()
            except CancelledError:
                continue
            except BrokenProcessPool:
                failure = DataError(
                    "a tokenizer process was killed, perhaps for want of memory: lower data.workers "
                    f"({order.workers}) and run again; finished files are kept"
                )
                break
            except Exception as error:
                failure = failure or error
                for pending in futures:  # not by shutdown, which tells nobody who waits for them
                    pending.cancel()
            else:
                parent.send((futures[future], record))
    return failure


def _begin(parent: Connection) -> None:
    """A worker ends with the foreman; otherwise it would wait for work for ever."""
    gc.enable()
    parent.close()  # else the foreman's death would not show at the other end
    foreman = multiprocessing.parent_process()
    assert foreman is not None, "runs in a worker only"

    def watch() -> None:
        foreman.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _end_with(parent: Connection) -> None:
    """Nothing more comes from the parent but its end."""
    try:
        parent.recv()
    except (EOFError, OSError):
        os._exit(1)
