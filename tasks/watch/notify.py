"""Tells somebody, by mail, Slack, webhook or whatever else Apprise speaks."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from hashlib import sha256

import apprise

from tasks.watch.memory import Memory

_log = logging.getLogger(__name__)

URLS_VARIABLE = "LLEMMA_NOTIFY_URLS"
"""Apprise's URLs, with blanks between: mailtos://…, slack://…, json://… They hold passwords, so that they are named
nowhere else."""


@dataclass(frozen=True)
class Event:
    """Something that is told once."""

    kind: str
    """As `notify.events` has it."""
    key: str
    """Its identity."""
    text: str
    """What happened, in a line."""
    todo: str
    """What is next."""


def tell(event: Event, title: str, line: str, memory: Memory) -> None:
    """Send a line to each address that has not had the event; where one does not take it, the next call tries again."""
    for number, url in enumerate(os.environ.get(URLS_VARIABLE, "").split(), start=1):
        told = f"{event.key} to {sha256(url.encode()).hexdigest()[:8]}"
        if told in memory.told:
            continue
        if _send(url, title, line):
            memory.note_told(told)
        else:
            _log.warning("address %d of %s does not take %r: see whether it is right", number, URLS_VARIABLE, title)


def _send(url: str, title: str, line: str) -> bool:
    logging.getLogger("apprise").disabled = True  # its lines name addresses
    sender = apprise.Apprise()
    return bool(sender.add(url) and sender.notify(title=title, body=line))
