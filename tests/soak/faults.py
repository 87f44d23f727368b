"""A store that fails again and again, at random times, in all ways."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from tests.faulty_s3 import FAULTS, FaultyS3


class RandomFaults:
    """Faults of a proxy, in a thread, until there were enough.

    Args:
        proxy: what fails.
        generator: of random numbers.
        lengths: seconds of each fault; their number is the faults'.
    """

    def __init__(self, proxy: FaultyS3, generator: random.Random, lengths: list[float]) -> None:
        self._proxy, self._generator, self._lengths = proxy, generator, lengths
        self._stop = threading.Event()
        self.met: Counter[str] = Counter()
        """Faults that some request has met."""
        self._thread = threading.Thread(target=self._run, daemon=True)

    @contextmanager
    def happening(self) -> Iterator[None]:
        """While the block lasts."""
        self._thread.start()
        try:
            yield
        finally:
            self._stop.set()
            self._thread.join()
            self._proxy.heal()

    def _run(self) -> None:
        faults = list(FAULTS)
        for number, seconds in enumerate(self._lengths):
            if number % len(faults) == 0:
                self._generator.shuffle(faults)
            if self._stop.wait(self._generator.uniform(3, 12)):
                return
            self._one(faults[number % len(faults)], seconds)

    def _one(self, fault: str, seconds: float) -> None:
        """From its first request on, or a while if none can be seen."""
        proxy = self._proxy
        while proxy.failed.acquire(blocking=False):
            pass
        proxy.fail(fault)
        met = fault == "refused"
        while not met and not self._stop.is_set():
            met = proxy.failed.acquire(timeout=1.0)
        self._stop.wait(seconds)
        proxy.heal()
        self.met[fault] += met
