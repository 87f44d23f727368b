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
from collections import defaultdict, deque
from types import TracebackType
from typing import Any

from neox_core.errors import GO_ON_EXIT_CODE, SUPERSEDED_EXIT_CODE
from neox_core.parallel.ranks.shared_store import shared_store
from neox_core.train.startup import rank_list

logger = logging.getLogger(__name__)

_FIRST_TIME = 30.0
"""Timeouts that work of a kind may take the first time: weights are loaded, kernels compiled."""
_SLOW = 3.0
"""Times as long as the longest of its kind, which work may take: a step of a large model takes a minute by itself."""
_MEASURED = 50
"""Of a kind, so many count."""
_WAITING = (
    "/torch/distributed/",
    "/deepspeed/comm/",
    "/deepspeed/runtime/pipe/p2p.py",
    "/neox_core/parallel/gradient_reduction.py",
    "/neox_core/train/observe/figures.py",
)
"""Sources in which a rank waits for others."""
_WAITS = "waiting for other ranks"
_SILENT = "no answer"
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
        self._place, self._allowance, self._beats = "start", _FIRST_TIME * timeout, 0
        self._seconds: dict[str, deque[float]] = {}
        self._begun = time.monotonic()
        self._store: Any = None
        self._stop = threading.Event()
        self._total = 0
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        # One of its own, as the store does not answer while the rank that holds it is stopped.
        self._sharing = threading.Thread(target=self._share, name="watchdog's share", daemon=True)

    def __enter__(self) -> Watchdog:
        self._store = shared_store("watchdog")
        self._thread.start()
        self._sharing.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._sharing.join(_GRACE_SECONDS)
        faulthandler.cancel_dump_traceback_later()

    def beat(self, place: str | None = None) -> None:
        """Say that this rank makes progress, which costs no more than some assignments.

        Args:
            place: what begins now, such as 'step 7'. Its first word is its kind, of which the first may take longer.
                None: nothing new, but something that others wait for makes progress, such as an upload.
        """
        if place is not None:
            now, kind, before = time.monotonic(), _kind(place), self._seconds.get(_kind(self._place))
            if before is None:  # the first of a kind tells nothing about the others
                self._seconds[_kind(self._place)] = deque([0.0], maxlen=_MEASURED)
            else:
                before.append(now - self._begun)
            known = self._seconds.get(kind)
            self._allowance = max(self._timeout, _SLOW * max(known)) if known else _FIRST_TIME * self._timeout
            self._place, self._begun = place, now
        self._beats += 1

    def end_soon(self, seconds: float, why: str) -> None:
        """End this process so many seconds from now, unless the job has ended by itself."""

        def wait() -> None:
            if not self._stop.wait(seconds):
                logger.error("%s; no step has ended within %.0f s: ending at once", why, seconds)
                logging.shutdown()
                os._exit(SUPERSEDED_EXIT_CODE)

        threading.Thread(target=wait, name="end soon", daemon=True).start()

    def _watch(self) -> None:
        seen, moved = (0, 0), time.monotonic()
        while not self._stop.wait(self._timeout / _LOOKS):
            now, found = time.monotonic(), (self._beats, self._total)
            faulthandler.dump_traceback_later(self._allowance, file=_STDERR, exit=True)
            if found != seen:
                seen, moved = found, now
            elif now - moved > self._allowance:
                self._end(now - moved)

    def _share(self) -> None:
        """Add to the job's heartbeats and learn their sum, as long as the store's host is there."""
        own = 0
        with contextlib.suppress(RuntimeError):
            while not self._stop.wait(self._timeout / _LOOKS):
                beats = self._beats
                self._total = int(self._store.add("beats", beats - own))
                own = beats

    def _end(self, seconds: float) -> None:
        """Write the stacks of all threads, then who was where, and exit."""
        grace = min(_GRACE_SECONDS, 4 * self._timeout / _LOOKS)
        # What follows needs locks and disks that the hung thread may hold.
        faulthandler.dump_traceback_later(3 * grace + _LAST_RESORT_SECONDS, file=_STDERR, exit=True)
        _write_stacks()
        places: dict[str, list[int]] = {}
        meeting = threading.Thread(
            target=self._meet, args=(f"{self._place}, {_whereabouts()}", grace, places), daemon=True
        )
        meeting.start()
        meeting.join(2 * grace)
        if not places:
            places = {"no answer of the store, which it holds": [0]}
        suspects = _suspects(places)
        because = f" because of {rank_list(suspects)}" if 0 < len(suspects) < self._world_size else ""
        logger.error(
            "rank %d: no rank made progress for %.0f s%s (launch.hang_timeout_minutes); they were at: %s. The stacks "
            "are in the ranks' logs. Run again to resume from the last checkpoint",
            self._rank,
            seconds,
            because,
            "; ".join(f"{place}: {rank_list(ranks)}" for place, ranks in places.items()),
        )
        logging.shutdown()
        sys.stdout.flush()
        if self._rank == 0:
            time.sleep(grace)  # it holds the store, which the others read
        os._exit(GO_ON_EXIT_CODE)  # the main thread does not react

    def _meet(self, place: str, grace: float, places: dict[str, list[int]]) -> None:
        """Say where this rank is, and after a while collect the ranks by where they are."""
        found = defaultdict(list)
        with contextlib.suppress(RuntimeError):
            self._store.set(str(self._rank), place)
            time.sleep(grace)
            for rank in range(self._world_size):
                there = self._store.check([str(rank)])
                found[self._store.get(str(rank)).decode() if there else _SILENT].append(rank)
        places.update(found)


def _suspects(places: dict[str, list[int]]) -> list[int]:
    """Those of the ranks, by where they are, for which the others may wait: a stopped process cannot even answer."""
    return places.get(_SILENT) or [
        rank for place, ranks in places.items() if not place.endswith(_WAITS) for rank in ranks
    ]


def _kind(place: str) -> str:
    return place.split(" ", 1)[0]


def _whereabouts() -> str:
    """What the main thread is at."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    innermost = ""
    while frame is not None:
        code = frame.f_code
        if any(source in code.co_filename for source in _WAITING):
            return _WAITS
        innermost = innermost or f"in {code.co_name} ({os.path.basename(code.co_filename)}:{frame.f_lineno})"
        frame = frame.f_back
    return innermost


def _write_stacks() -> None:
    """Write the stacks of all threads to the log at once, so that nothing else can be printed in between."""
    stacks = os.memfd_create("stacks")  # no file: a disk that does not answer may be why the rank hangs
    faulthandler.dump_traceback(file=stacks, all_threads=True)
    os.write(_STDERR, os.pread(stacks, os.fstat(stacks).st_size, 0))
