"""What a test does in a second thread while it does something itself."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_AGAIN_SECONDS = 0.1


class _Interrupted(BaseException):
    """The second thread has failed; no `except Exception` on the way is to keep it."""


@contextmanager
def meanwhile(act: Callable[[], object]) -> Iterator[None]:
    """Act in a second thread while the block runs, which ends when both have ended.

    What the second thread raises is raised here, and ends the block at once: it may wait for what that thread was to
    do. In the main thread only.
    """
    main, failures = threading.get_ident(), list[BaseException]()
    begun, over, heard = threading.Event(), threading.Event(), False

    def run() -> None:
        begun.wait()
        try:
            act()
        except BaseException as error:
            failures.append(error)
            # Again until it is heard: what comes just before the main thread begins to wait does not end the wait.
            while not over.is_set():
                signal.pthread_kill(main, signal.SIGUSR1)
                over.wait(_AGAIN_SECONDS)

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal heard
        if not (heard or over.is_set()):
            heard = True
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
