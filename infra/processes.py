"""Processes that outlive whoever started them: known by pid and start time, so that a reused pid is never mistaken."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterable
from dataclasses import dataclass

import psutil  # type: ignore[import-untyped]

_SAME_START_SECONDS = 2.0
"""The start time is computed from the boot time, which moves a little when the clock is set."""
_KILLED_SECONDS = 60.0
"""For the kernel to end killed processes, which takes it seconds on a busy machine."""


@dataclass(frozen=True)
class ProcessRecord:
    """A process; `started` is in unix seconds."""

    pid: int
    started: float

    @classmethod
    def of(cls, pid: int) -> ProcessRecord:
        """Record a running process.

        Raises:
            ProcessLookupError: it has ended.
        """
        try:
            return cls(pid, float(psutil.Process(pid).create_time()))
        except psutil.NoSuchProcess:
            raise ProcessLookupError(f"process {pid} has ended") from None

    def is_alive(self) -> bool:
        """Whether this very process still runs (an ended one that nobody has waited for does not)."""
        return self._status() not in (None, psutil.STATUS_ZOMBIE)

    def is_stopped(self) -> bool:
        """Whether it was stopped, as by SIGSTOP; a debugger's is another state."""
        return self._status() == psutil.STATUS_STOPPED

    def reap(self) -> None:
        """If it has ended and is a child of this process, wait until its last thread is gone too."""
        if self._status() == psutil.STATUS_ZOMBIE:
            with contextlib.suppress(ChildProcessError):  # not our child: its parent, or init, reaps it
                os.waitpid(self.pid, 0)

    def send(self, number: signal.Signals) -> None:
        """Send a signal if it still runs."""
        if self.is_alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def _status(self) -> str | None:
        """psutil's word for its state; None if it is gone, or the pid is another process's by now."""
        try:
            process = psutil.Process(self.pid)
            same = abs(process.create_time() - self.started) < _SAME_START_SECONDS
            return str(process.status()) if same else None
        except psutil.NoSuchProcess:
            return None


def end_processes(records: Iterable[ProcessRecord], grace_seconds: float) -> None:
    """SIGTERM, then SIGKILL to what still runs after the grace; returns when all have ended."""
    records = tuple(records)
    for number, seconds in ((signal.SIGTERM, grace_seconds), (signal.SIGKILL, _KILLED_SECONDS)):
        for record in records:
            record.send(number)
        wait_for_end(records, seconds)


def wait_for_end(records: Iterable[ProcessRecord], timeout_seconds: float) -> bool:
    """Wait until all have ended; False after the timeout. Ended children of this process are reaped."""
    records = tuple(records)
    deadline = time.monotonic() + timeout_seconds
    while any(record.is_alive() for record in records):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    for record in records:
        record.reap()
    return True
