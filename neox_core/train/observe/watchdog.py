"""Ends a job in which no rank makes progress any more, with every rank's stack in its log.

A rank that waits for ever in a collective, a read or a lock raises nothing, and neither do those that wait for it.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import sys
import threading
import time
from collections import defaultdict
from types import TracebackType
from typing import Any

from neox_core.errors import GO_ON_EXIT_CODE
from neox_core.parallel.shared_store import shared_store
from neox_core.train.startup import rank_list

logger = logging.getLogger(__name__)

_FIRST_TIME = 3.0
"""Timeouts that work of a kind may take the first time: weights are loaded, kernels compiled."""
_STDERR = 2
_LOOKS = 20
"""Per timeout."""
_GRACE_SECONDS = 20.0
"""At most, for other ranks to write their stacks before the first exit ends the job."""
_LAST_RESORT_SECONDS = 10.0
"""After which a rank that cannot even report its hang is ended."""


class Watchdog:
    """A thread of each rank that looks whether any rank still makes progress. A context manager within a process group.

    What counts is the job's last heartbeat, not this rank's: one rank may well wait while another finishes an upload.
    The ranks share a counter in the process group's store, so that all of them find out at the same time. Should a
    thread hold Python's lock for the whole time, a timer outside of Python writes the stacks and exits.

    Args:
        timeout: seconds without any rank's heartbeat.
        rank, world_size: this rank, and their number.
    """

    def __init__(self, timeout: float, rank: int, world_size: int) -> None:
        self._timeout, self._rank, self._world_size = timeout, rank, world_size
        self._place, self._allowance, self._beats = "start", _FIRST_TIME, 0
        self._kinds: set[str] = set()
        self._store: Any = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._store = shared_store("watchdog")
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def beat(self, place: str | None = None) -> None:
        """Say that this rank makes progress, which costs no more than some assignments.

        Args:
            place: what begins now, such as 'step 7'. Its first word is its kind, of which the first may take longer.
                None: nothing new, but something that others wait for makes progress, such as an upload.
        """
        if place is not None:
            kind = place.split(" ", 1)[0]
            self._place, self._allowance = place, 1.0 if kind in self._kinds else _FIRST_TIME
            self._kinds.add(kind)
        self._beats += 1

    def _watch(self) -> None:
        own = total = 0
        moved = time.monotonic()
        while not self._stop.wait(self._timeout / _LOOKS):
            now = time.monotonic()
            faulthandler.dump_traceback_later(self._timeout * self._allowance, file=_STDERR, exit=True)
            beats = self._beats
            new_total = self._exchange(beats - own)
            if beats != own or new_total != total:
                own, total, moved = beats, new_total, now
            elif now - moved > self._timeout * self._allowance:
                self._end(now - moved)

    def _exchange(self, beats: int) -> int:
        """Add to the job's heartbeats and return their sum; 0 when the store's host is gone."""
        with contextlib.suppress(RuntimeError):
            return int(self._store.add("beats", beats))
        return 0

    def _end(self, seconds: float) -> None:
        """Write the stacks of all threads, then who was where, and exit."""
        grace = min(_GRACE_SECONDS, 4 * self._timeout / _LOOKS)
        # What follows needs locks and disks that the hung thread may hold.
        faulthandler.dump_traceback_later(2 * grace + _LAST_RESORT_SECONDS, file=_STDERR, exit=True)
        _write_stacks()
        with contextlib.suppress(RuntimeError):
            self._store.set(str(self._rank), self._place)
        time.sleep(grace)
        logger.error(
            "rank %d: no rank made progress for %.0f s (launch.hang_timeout_minutes); they were at: %s. The stacks "
            "are in the ranks' logs. Run again to resume from the last checkpoint",
            self._rank,
            seconds,
            self._places(),
        )
        logging.shutdown()
        sys.stdout.flush()
        if self._rank == 0:
            time.sleep(grace)  # it holds the store, which the others read
        os._exit(GO_ON_EXIT_CODE)  # the main thread does not react

    def _places(self) -> str:
        ranks = defaultdict(list)
        with contextlib.suppress(RuntimeError):
            for rank in range(self._world_size):
                found = self._store.check([str(rank)])
                ranks[self._store.get(str(rank)).decode() if found else "no answer"].append(rank)
        return "; ".join(f"{place}: {rank_list(own)}" for place, own in ranks.items()) or "unknown"


def _write_stacks() -> None:
    """Write the stacks of all threads to the log at once, so that nothing else can be printed in between."""
    stacks = os.memfd_create("stacks")  # no file: a disk that does not answer may be why the rank hangs
    faulthandler.dump_traceback(file=stacks, all_threads=True)
    os.write(_STDERR, os.pread(stacks, os.fstat(stacks).st_size, 0))
