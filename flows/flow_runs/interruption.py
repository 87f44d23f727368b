"""Child flows at the same time, in threads, which stop when the main thread is told to."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

Result = TypeVar("Result")

_WAKE_SECONDS = 0.5

_interruption: contextvars.ContextVar[list[BaseException] | None] = contextvars.ContextVar("interruption", default=None)


def side_by_side(config: str, *flows: Callable[[str], Result]) -> list[Result]:
    """Run flows at the same time, as children of the running one, each to its own end.

    A signal (Cancel, SIGTERM, Ctrl-C) reaches the main thread only; it is raised again in each child, by
    `raise_if_interrupted`, so that all end and Prefect knows what became of them.

    Args:
        config: path of the run's YAML file, the flows' argument.
        flows: in the order of their importance.

    Raises:
        Exception: when all have ended, that of the first flow in the given order that failed.
    """
    interruption: list[BaseException] = []
    all_there = threading.Event()  # an error of one must not meet the start of another

    def run(flow: Callable[[str], Result]) -> Result:
        all_there.wait()
        return flow(config)

    with ThreadPoolExecutor(len(flows)) as pool:
        futures: list[Future[Result]] = []
        try:
            for flow in flows:
                context = contextvars.copy_context()
                context.run(_interruption.set, interruption)
                futures.append(pool.submit(context.run, run, flow))
            all_there.set()
            while wait(futures, _WAKE_SECONDS).not_done:
                pass  # awake, so that a signal is heard whichever thread the kernel has given it to
        except BaseException as error:
            interruption.append(error)
            all_there.set()
            raise
    return [future.result() for future in futures]


def raise_if_interrupted() -> None:
    """Raise what has interrupted the `side_by_side` that this flow is a child of, if anything has."""
    for error in _interruption.get() or ():
        raise error
