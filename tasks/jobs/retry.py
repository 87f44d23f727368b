"""Patience with a scheduler that does not answer: its jobs go on without it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from neox_core.errors import LaunchError

_log = logging.getLogger(__name__)

_UNANSWERED = 60
"""Questions in a row that may stay unanswered: an hour, in which a cluster's controller can be upgraded."""
_SILENCE_SECONDS = 60.0
"""How long after an unanswered question the next one is put."""
_MEANWHILE_SECONDS = 0.5

_Answer = TypeVar("_Answer")


class NoAnswer(LaunchError):
    """The scheduler does not answer, so that nothing can be concluded."""


class SchedulerRetry:
    """Asks a scheduler, and bears it if some questions in a row are not answered."""

    def __init__(self) -> None:
        self._unanswered = 0
        self._asked = float("-inf")

    def ask(self, question: Callable[[], _Answer]) -> _Answer | None:
        """The answer, which must not be None itself; None if there is none for now.

        May be called often: in a silence, the question is put again after a while only.

        Raises:
            LaunchError: there was none too often.
        """
        if self._unanswered and time.monotonic() - self._asked < _SILENCE_SECONDS:
            return None
        try:
            answer = question()
        except NoAnswer as error:
            self._unanswered += 1
            self._asked = time.monotonic()
            if self._unanswered >= _UNANSWERED:
                raise LaunchError(
                    f"{error} (asked {_UNANSWERED} times; what runs in SLURM goes on, and a later run follows it)"
                ) from None
            _log.warning("%s (%d of %d times)", error, self._unanswered, _UNANSWERED)
            return None
        self._unanswered = 0
        return answer

    def wait_for(self, question: Callable[[], _Answer], meanwhile: Callable[[], None] = lambda: None) -> _Answer:
        """The answer, when it comes.

        Args:
            meanwhile: called again and again until then.

        Raises:
            LaunchError: it did not come too often.
        """
        while (answer := self.ask(question)) is None:
            meanwhile()
            time.sleep(_MEANWHILE_SECONDS)
        return answer
