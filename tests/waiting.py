"""What tests wait for."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

Found = TypeVar("Found")


def wait_for(condition: Callable[[], Found], seconds: float, pause: float = 0.05) -> Found:
    """What the condition returns, once that is true; it is asked again after each pause.

    Raises:
        AssertionError: it was not true in time.
    """
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "timed out"
        time.sleep(pause)
    return found
