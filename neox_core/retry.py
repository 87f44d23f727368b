"""Patience with a service that does not answer for a while: when to ask again, and when to give up."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

_Answer = TypeVar("_Answer")


@dataclass(frozen=True)
class Failure:
    """A failed attempt, among others in a row."""

    error: Exception
    attempts: int
    """So far."""
    since: float
    """Unix time of the first one."""
    wait: float
    """Seconds until the next attempt; 0 if there is none."""


@dataclass(frozen=True)
class RetryPolicy:
    """Tries again with growing pauses of random length, so that many that wait do not come back at once."""

    patience: float
    """Seconds from the first failure after which it gives up."""
    first_wait: float = 1.0
    """Seconds of the first pause, at most; each following one may be twice as long."""
    longest_wait: float = 60.0

    def wait(self, attempts: int) -> float:
        """Seconds to pause after this many failed attempts: between half of what is allowed and all of it."""
        allowed = min(self.longest_wait, self.first_wait * 2.0 ** min(attempts - 1, 30))
        return allowed * random.uniform(0.5, 1.0)

    def call(
        self,
        attempt: Callable[[], _Answer],
        may_pass: Callable[[Exception], bool],
        on_failure: Callable[[Failure], None] = lambda _: None,
        sleep: Callable[[float], object] = time.sleep,
    ) -> _Answer:
        """The answer of an attempt that succeeds.

        Args:
            may_pass: whether an error may be gone at the next attempt.
            on_failure: called after each failed attempt that may pass; may raise, and the last time with no wait.
            sleep: called with the seconds of each pause; may raise.

        Raises:
            Exception: what the last attempt raised.
        """
        attempts, since, deadline = 0, 0.0, 0.0
        while True:
            try:
                return attempt()
            except Exception as error:
                if not may_pass(error):
                    raise
                attempts += 1
                if attempts == 1:
                    since, deadline = time.time(), time.monotonic() + self.patience
                remaining = deadline - time.monotonic()
                wait = min(self.wait(attempts), remaining) if remaining > 0 else 0.0
                on_failure(Failure(error, attempts, since, wait))
                if wait <= 0:
                    raise
                sleep(wait)
