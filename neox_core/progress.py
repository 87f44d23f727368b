"""How long work tells its caller how far it is."""

from __future__ import annotations

import time
from collections.abc import Callable

Progress = Callable[[float, str], None]
"""Called with the share of the work that is done (0 to 1) and a short text, such as '12 of 40 files, 3.1 MB/s'."""


def silent(share: float, text: str) -> None:
    """Progress that nobody watches."""


def with_time_left(progress: Progress) -> Progress:
    """Tells also how much time is left, as fast as the share has grown since the first call; not if the text does."""
    first: tuple[float, float] | None = None

    def report(share: float, text: str) -> None:
        nonlocal first
        now = time.monotonic()
        first = first or (now, share)
        if 1 > share > first[1] and not text.endswith(" left"):
            left = (now - first[0]) * (1 - share) / (share - first[1])
            text = f"{text}, about {short_time(left)} left"
        progress(share, text)

    return report


def short_time(seconds: float) -> str:
    """12 d 3 h, 3 h 20 min, 5 min or 12 s."""
    minutes = int(seconds / 60)
    days, hours = minutes // 1440, minutes // 60 % 24
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes % 60} min" if hours else f"{minutes} min" if minutes else f"{int(seconds)} s"
