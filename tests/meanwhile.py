"""What a test does in a second thread while it does something itself."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class _Interrupted(BaseException):
    """The second thread has failed; no `except Exception` on the way is to keep it."""


@contextmanager
def meanwhile(act: Callable[[], object]) -> Iterator[None]:
    """Act in a second thread while the block runs, which ends when both have ended.

    What the second thread raises is raised here, and ends the block at once: it may wait for what that thread was to
    do. In the main thread only.
    """
    main, failures = threading.get_ident(), list[BaseException]()
    begun, over = threading.Event(), threading.Event()

    def run() -> None:
        begun.wait()
        try:
            act()
        except BaseException as error:
            failures.append(error)
            if not over.is_set():
                signal.pthread_kill(main, signal.SIGUSR1)

    def interrupt(number: int, frame: FrameType | None) -> None:
        if not over.is_set():
            raise _Interrupted

    before = signal.signal(signal.SIGUSR1, interrupt)
    thread = threading.Thread(target=run)
    thread.start()
    try:
        begun.set()
        yield
    except _Interrupted:
        if not failures:  # it is another block's, around this one
            raise
    finally:
        over.set()
        thread.join()
        signal.signal(signal.SIGUSR1, before)
        if failures:
            raise failures[0]
