"""Child flows at the same time, in threads, which stop when the main thread is told to."""

from __future__ import annotations

import contextvars
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
    with ThreadPoolExecutor(len(flows)) as pool:
        futures: list[Future[Result]] = []
        try:
            for flow in flows:
                context = contextvars.copy_context()
                context.run(_interruption.set, interruption)
                futures.append(pool.submit(context.run, flow, config))
            while wait(futures, _WAKE_SECONDS).not_done:
                pass  # awake, so that a signal is heard whichever thread the kernel has given it to
        except BaseException as error:
            interruption.append(error)
            raise
    return [future.result() for future in futures]


def raise_if_interrupted() -> None:
    """Raise what has interrupted the `side_by_side` that this flow is a child of, if anything has."""
    for error in _interruption.get() or ():
        raise error
