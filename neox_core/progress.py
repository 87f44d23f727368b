"""How long work tells its caller how far it is."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[float, str], None]
"""Called with the share of the work that is done (0 to 1) and a short text, such as '12 of 40 files, 3.1 MB/s'."""


def silent(share: float, text: str) -> None:
    """Progress that nobody watches."""
