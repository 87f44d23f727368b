"""How long the phases of a step take, without waiting for the device."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

import torch


class Event(Protocol):
    """A point in time, as torch.cuda.Event."""

    def record(self) -> None:
        """Set it to now, in the order of the device's work."""

    def query(self) -> bool:
        """Whether it was reached."""

    def synchronize(self) -> None:
        """Wait for it."""

    def elapsed_time(self, end: Any) -> float:
        """Milliseconds from here to `end`."""


class HostEvent:
    """An event where the host does the work itself."""

    def record(self) -> None:
        """Set it to now."""
        self.time = time.perf_counter()

    def query(self) -> bool:
        """Always reached."""
        return True

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def elapsed_time(self, end: HostEvent) -> float:
        """Milliseconds from here to `end`."""
        return 1e3 * (end.time - self.time)


def new_event(device: torch.device) -> Event:
    """An event of the device's kind."""
    return torch.cuda.Event(enable_timing=True) if device.type == "cuda" else HostEvent()  # type: ignore[no-untyped-call]


class PhaseTimer:
    """Marks where phases begin; on a GPU with events, which are read when they have long passed."""

    def __init__(self, device: torch.device) -> None:
        self._new_event = partial(new_event, device)
        self._marks: list[tuple[str | None, Event]] = []

    def mark(self, phase: str | None) -> None:
        """A phase begins, which ends the one before; None: what follows is not counted."""
        event = self._new_event()
        event.record()
        self._marks.append((phase, event))

    def take(self) -> Phases:
        """The phases so far; what is marked from now on is taken next time."""
        taken, self._marks = self._marks, []
        return Phases(taken)


class Phases:
    """Marks that may not be reached yet."""

    def __init__(self, marks: Sequence[tuple[str | None, Event]]) -> None:
        self._marks = marks

    def passed(self) -> bool:
        """Whether all of them have been reached, so that reading them does not wait."""
        return self._marks[-1][1].query()

    def wait(self) -> None:
        """Wait until they are."""
        self._marks[-1][1].synchronize()

    def seconds(self) -> dict[str, float]:
        """Time of each phase, summed over the steps."""
        found: dict[str, float] = defaultdict(float)
        for (phase, begin), (_, end) in zip(self._marks, self._marks[1:], strict=False):
            if phase is not None:
                found[phase] += begin.elapsed_time(end) / 1e3
        return found
