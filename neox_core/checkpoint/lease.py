"""Who may write a training's checkpoints: the job that came last.

Two jobs of one training are a mistake that happens: a job that was requeued while its first life goes on somewhere, or
the same configuration started twice. The later one raises the number in the lease, an object next to the checkpoints;
the number is in all keys of its saves. The earlier one sees that within seconds, publishes nothing more, and stops.
Nothing here depends on clocks, nor does a job wait until another one's lease has run out.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from types import TracebackType
from typing import Any

from neox_core.checkpoint.manifest import checkpoint_attempt, listing_key
from neox_core.config import StorageConfig
from neox_core.errors import LaunchError, StorageError
from neox_core.retry import RetryPolicy
from neox_core.storage.conditional_store import ConditionalStore

logger = logging.getLogger(__name__)

LEASE_FILE = "lease.json"
_RENEWAL_SECONDS = 10.0
_FIRST_LOOK_SECONDS = 1.0
"""After which a job looks for another one that came at the same moment, where the store cannot tell them apart."""
_FRESH_SECONDS = 60.0
"""Since its last renewal, for which the job before may be alive."""
_READ_TIMEOUT = 20.0


class SupersededError(LaunchError):
    """Another job writes this training's checkpoints now."""


@dataclass(frozen=True)
class Holder:
    """A job that has, or had, the lease."""

    number: int
    """Of the job among the training's, from 1."""
    token: str
    """Random, as numbers may be equal where the store has no conditional PUT."""
    place: str
    """For people: host, process, and job of the scheduler."""
    renewed: float
    """Unix time, by the job's own clock: for people."""

    def to_json(self) -> str:
        """As it is stored."""
        return json.dumps(asdict(self), sort_keys=True)


class Lease:
    """One job's lease, on one of its ranks. A context manager: within it, the lease is renewed and watched.

    Args:
        config: the store.
        prefix: the training's key.
        on_lost: called once, in a thread, with what tells who has the lease now.
        renewal: seconds from one renewal to the next.
    """

    def __init__(
        self,
        config: StorageConfig,
        prefix: str,
        on_lost: Callable[[SupersededError], None],
        renewal: float = _RENEWAL_SECONDS,
    ) -> None:
        self._key, self._prefix, self._on_lost, self._renewal = f"{prefix}/{LEASE_FILE}", prefix, on_lost, renewal
        self._stop = threading.Event()
        policy = RetryPolicy(60 * config.patience_minutes, longest_wait=renewal)
        self._store = ConditionalStore(config, policy=policy, stopped=self._stop, read_timeout=_READ_TIMEOUT)
        self._conditional = self._store.is_conditional(f"{self._key}.{uuid.uuid4().hex}")
        if not self._conditional:
            logger.warning(
                "%s has no atomic conditional PUT: jobs of one training are told apart by their numbers alone",
                self._store.endpoint,
            )
        self._own, self._etag = self._take()
        self._thread = threading.Thread(target=self._watch, name="lease", daemon=True)

    @property
    def number(self) -> int:
        """Of this job among the training's."""
        return self._own.number

    def check(self) -> None:
        """Look whether this job still has the lease.

        Raises:
            SupersededError: it has not.
            StorageError: the store stays away.
        """
        found = self._store.read(self._key)
        holder = None if found is None else _holder(found.text)
        if holder is not None and holder.token != self._own.token:
            raise SupersededError(
                f"{self._store.url(self._prefix)} is written by another job of this training now, number "
                f"{holder.number} ({holder.place}): this one, number {self.number}, stops; if both are wanted, give "
                "one another seed or another storage.url"
            )

    def __enter__(self) -> Lease:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _take(self) -> tuple[Holder, str]:
        """Become the holder, whoever is. Several that come at the same moment get numbers one after the other."""
        while True:
            found = self._store.read(self._key)
            before = None if found is None else _holder(found.text)
            number = 1 + (before.number if before else self._highest_attempt())
            own = Holder(number, uuid.uuid4().hex, _place(), time.time())
            if etag := self._write(own, found.etag if found else None):
                if before and own.renewed - before.renewed < _FRESH_SECONDS:
                    logger.warning(
                        "job number %d (%s) had the lease a moment ago: if it is still at work, it will stop",
                        before.number,
                        before.place,
                    )
                return own, etag

    def _write(self, holder: Holder, etag: str | None) -> str | None:
        """The new ETag; None: the lease is not what it was."""
        if not self._conditional:
            return self._store.overwrite(self._key, holder.to_json())
        if new := self._store.replace(self._key, holder.to_json(), etag):
            return new
        # The answer to an attempt that was done may have been lost.
        found = self._store.read(self._key)
        return found.etag if found and found.text == holder.to_json() else None

    def _highest_attempt(self) -> int:
        """Without a lease, the keys tell: it may have been removed."""
        base = listing_key(self._prefix)
        names = {info.key.removeprefix(base).split("/")[0] for info in self._store.list(base)}
        return max((checkpoint_attempt(name) for name in names), default=0)

    def _watch(self) -> None:
        wait = self._renewal if self._conditional else min(self._renewal, _FIRST_LOOK_SECONDS)
        while not self._stop.wait(wait):
            wait = self._renewal
            try:
                self._renew()
            except SupersededError as error:
                logger.error("%s", error)
                self._on_lost(error)
                return
            except StorageError as error:
                if not self._stop.is_set():
                    logger.warning("the lease is not renewed: %s", error)

    def _renew(self) -> None:
        if not self._conditional:
            self.check()
            return  # writing might take the lease away from a job that has come since
        own = replace(self._own, renewed=time.time())
        etag = self._write(own, self._etag)
        if etag is None:
            self.check()
            etag = self._write(own, None)  # it was removed
        if etag is not None:
            self._etag = etag


@dataclass(frozen=True)
class JobLease:
    """What ranks know of it."""

    number: int
    """Of the job among the training's."""
    check: Callable[[], None]
    """Raises SupersededError if another job has the lease; of rank 0, on others it does nothing."""


@contextmanager
def leased(
    storage: StorageConfig, prefix: str, rank: int, on_lost: Callable[[SupersededError], None]
) -> Iterator[JobLease]:
    """Take the lease from whoever has it, and watch over it while the block lasts. Collective over all ranks.

    Args:
        on_lost: called on rank 0, in a thread.
    """
    import torch.distributed as dist  # takes seconds, and a look at a job's files does without

    with ExitStack() as stack:
        lease = stack.enter_context(Lease(storage, prefix, on_lost)) if rank == 0 else None
        number: list[Any] = [lease.number if lease else None]
        dist.broadcast_object_list(number, src=0)
        yield JobLease(number[0], lease.check if lease else _nothing)


def _nothing() -> None:
    """Other ranks have no lease to look at."""


def _holder(text: str) -> Holder | None:
    """What an object of the lease's key says; None: it is none, and will be overwritten."""
    try:
        holder = Holder(**json.loads(text))
    except (ValueError, TypeError):
        return None
    return holder if isinstance(holder.number, int) and isinstance(holder.renewed, float) else None


def _place() -> str:
    job = os.environ.get("SLURM_JOB_ID")
    return f"host {socket.gethostname()}, process {os.getpid()}" + (f", SLURM job {job}" if job else "")
