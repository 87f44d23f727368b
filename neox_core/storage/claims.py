"""Claims: of what has a name in a workdir, one process at a time has it; the kernel drops a dead process's."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from neox_core.progress import Progress

_CLAIM_SECONDS = 1.0
"""How often what another process has is tried again."""


@contextmanager
def claim(workdir: Path, name: str, what: str, progress: Progress) -> Iterator[None]:
    """Have something in a workdir for this run alone while the context lasts; wait for a run that has it now.

    Args:
        what: says it in the progress while waiting.
    """
    while True:
        with try_claim_name(workdir, name) as claimed:
            if claimed:
                yield
                return
        progress(0.0, f"another run is at work on {what}: waiting for it")
        time.sleep(_CLAIM_SECONDS)


@contextmanager
def try_claim_name(workdir: Path, name: str) -> Iterator[bool]:
    """Whether no other process has it; if so, none can while the context lasts."""
    path = claim_file(workdir, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            claimed = True
        except BlockingIOError:
            claimed = False
        yield claimed


def claim_file(workdir: Path, name: str) -> Path:
    """The file whose lock is the claim of this name."""
    return workdir / ".claims" / name


def is_claimed(workdir: Path, pattern: str) -> bool:
    """Whether a run is at work now on anything in a workdir whose name matches."""
    for path in (workdir / ".claims").glob(pattern):
        with path.open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
    return False
