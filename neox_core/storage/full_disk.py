"""A disk that has no room left, which a training outlives."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from neox_core.errors import ConfigError
from neox_core.storage.atomic import write_atomically


def is_full(error: OSError) -> bool:
    """Whether it says that there is no room, on the disk or in the user's share of it."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def room_below(folder: Path) -> Iterator[None]:
    """Work that writes there, and that goes on when it is asked for again.

    Raises:
        ConfigError: its disk is full.
    """
    try:
        yield
    except OSError as error:
        if not is_full(error):
            raise
        raise ConfigError(
            f"the disk of {folder} is full: it has {_free(folder):,} bytes left; make room and give the same command "
            "again, which goes on from what is kept"
        ) from error


def write_if_room(path: Path, text: str) -> None:
    """Write a small file atomically; on a full disk, do without: a note of what is said elsewhere, too."""
    try:
        write_atomically(path, text)
    except OSError as error:
        if not is_full(error):
            raise


def room_wanted(path: Path, need: int) -> str:
    """What the disk of a path has and what is needed there, in words."""
    free = _free(path.parent)
    return f"needs {need:,} bytes ({need / 1e9:.1f} GB) there, and the disk has {free:,} ({free / 1e9:.1f} GB) left"


def _free(folder: Path) -> int:
    """Bytes that are left where a folder is, or would be."""
    absolute = folder.absolute()
    return shutil.disk_usage(next(place for place in (absolute, *absolute.parents) if place.exists())).free
