"""A disk that has no room left, which a training outlives."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path


def is_full(error: OSError) -> bool:
    """Whether it says that there is no room, on the disk or in the user's share of it."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def room_wanted(path: Path, need: int) -> str:
    """What the disk of a path has and what is needed there, in words."""
    free = shutil.disk_usage(next(parent for parent in path.absolute().parents if parent.exists())).free
    return f"needs {need:,} bytes ({need / 1e9:.1f} GB) there, and the disk has {free:,} ({free / 1e9:.1f} GB) left"
