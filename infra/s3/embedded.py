"""The embedded S3 server as a context: shared by any number of processes, stopped by the last that leaves."""

from __future__ import annotations

import contextlib
import fcntl
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from infra.s3 import server
from infra.s3.server import S3Endpoint

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def embedded_s3(folder: Path) -> Iterator[S3Endpoint]:
    """The S3 server whose data lie in `folder`, found running or started; the last user out stops it.

    Every user holds a shared lock on the file `users`, which the kernel drops when a user dies, however it dies. A
    server whose users were all killed keeps running until the next one finds it, uses it and stops it.

    Raises:
        StorageError: Swift is not installed, or the server cannot be started.
    """
    folder = folder.resolve()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # server.json holds the secret key
    with (folder / "users").open("a") as users:
        with _exclusive(folder):
            fcntl.flock(users, fcntl.LOCK_SH)
            endpoint = server.ensure_running(folder)
        try:
            yield endpoint
        finally:
            with _exclusive(folder):
                fcntl.flock(users, fcntl.LOCK_UN)
                if _is_unused(users):
                    server.stop(folder)


@contextlib.contextmanager
def _exclusive(folder: Path) -> Iterator[None]:
    """One process at a time comes or goes."""
    with (folder / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _is_unused(users: IO[str]) -> bool:
    try:
        fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
