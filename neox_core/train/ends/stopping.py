"""An end before the last step that all ranks agree on: at a step's boundary, so that the state there can be saved.

Any rank may ask for it at any time: a signal came, the time limit is near, or the object store was given up.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

_REQUEST, _BOUNDARY = "request", "boundary"
_AHEAD = 2
"""Boundaries by which some rank may be ahead of rank 0: to judge a step, all wait for the outcome of the one before."""
LOCAL_END_TIME = "LLEMMA_JOB_END_TIME"
END_TIMES = ("SLURM_JOB_END_TIME", LOCAL_END_TIME)
"""Environment variables: the unix time at which the scheduler ends the job; the second one is of local jobs."""
_INTERVALS = 50
"""Steps whose longest counts for each of those to come; for one of them the longest of all does, with a validation."""
_SAVE_MARGIN = 1.5
"""Of the time that a save may take, over the longest so far."""
_UNMEASURED_SHARE, _UNMEASURED_SECONDS = 0.1, 300.0
"""Of the time that was left at the start, for a save before one was measured; and at most."""

SIGNALS = (signal.SIGTERM, signal.SIGUSR2)
"""What schedulers and people send before they end a job."""


@dataclass(frozen=True)
class Stop:
    """Why training stops."""

    kind: Literal["interrupted", "storage", "superseded"]
    """interrupted: it can go on at once; storage: the object store was given up; superseded: another job of this
    training is at work, so that nothing is saved."""
    reason: str


class StopAtBoundary(Exception):
    """Training stops on all ranks after this step, whose state was handed over to be saved unless another job is at
    work."""

    def __init__(self, stop: Stop, step: int) -> None:
        super().__init__(stop.reason)
        self.stop, self.step = stop, step


def end_time(environment: Mapping[str, str] = os.environ) -> float | None:
    """Unix time at which the scheduler will end this job; None if it does not say."""
    found = [environment[name] for name in END_TIMES if environment.get(name, "").replace(".", "").isdigit()]
    return float(found[0]) if found else None


class Stopping:
    """One rank's part in the agreement.

    Args:
        channel: a torch.distributed store of all ranks.
        rank, world_size: this rank, and their number.
        ends_at: unix time of the job's end, if there is a limit.
    """

    def __init__(self, channel: Any, rank: int, world_size: int, ends_at: float | None) -> None:
        self._channel, self._rank, self._ends_at = channel, rank, ends_at
        self._ahead = _AHEAD if world_size > 1 else 0
        self._boundaries, self._stop_at = 0, -1
        self._signal: int | None = None
        now = time.time()
        self._steps, self._longest = deque([0.0], maxlen=_INTERVALS), 0.0
        self._last: float | None = None
        self._save_seconds = min(_UNMEASURED_SECONDS, _UNMEASURED_SHARE * max(0.0, (ends_at or now) - now))
        self._measured = False

    def request(self, stop: Stop) -> None:
        """Ask for a stop, from any thread; the first request counts."""
        self._channel.compare_set(_REQUEST, "", json.dumps(asdict(stop)))

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        """While it lasts, signals ask for a stop. In the main thread."""
        before = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def saved(self, seconds: float) -> None:
        """A save took this long, from the step's end to the manifest in the store."""
        self._save_seconds = max(seconds, self._save_seconds) if self._measured else seconds
        self._measured = True

    def due(self) -> Stop | None:
        """At each step's boundary, on all ranks: whether to stop here. All get the same answer."""
        self._boundaries += 1
        now = time.time()
        if self._last is not None:  # what comes before the first boundary is mostly the start of the job
            self._steps.append(now - self._last)
            self._longest = max(self._longest, now - self._last)
        self._last = now
        if self._signal is not None:
            name = signal.Signals(self._signal).name
            self.request(Stop("interrupted", f"rank {self._rank} received {name}"))
            self._signal = None
        if self._stop_at < 0:
            self._agree(now)
        if self._stop_at < 0 or self._boundaries < self._stop_at:
            return None
        return Stop(**json.loads(self._channel.get(_REQUEST)))

    @property
    def lead(self) -> float:
        """Seconds that the steps until a stop and its save take, as measured."""
        return (self._ahead + 1) * max(self._steps) + self._longest + _SAVE_MARGIN * self._save_seconds

    def _agree(self, now: float) -> None:
        if self._rank == 0:
            if self._ends_at is not None and now + self.lead >= self._ends_at:
                left = f"{self._ends_at - now:.0f} s are left of the time limit"
                self.request(Stop("interrupted", f"{left}, and some steps and a save take {self.lead:.0f} s"))
            if self._channel.check([_REQUEST]):
                self._stop_at = self._boundaries + self._ahead
                self._channel.set(_BOUNDARY, str(self._stop_at))
        elif self._channel.check([_BOUNDARY]):
            self._stop_at = int(self._channel.get(_BOUNDARY))

    def _on_signal(self, number: int, frame: Any) -> None:
        self._signal = number  # no more than that: the channel may be in use at this very moment
