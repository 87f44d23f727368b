"""A file of rows that a training adds to, whatever room the disk has."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from neox_core.storage.atomic import write_atomically
from neox_core.storage.full_disk import is_full, room_wanted

logger = logging.getLogger(__name__)


class RowFile:
    """JSON objects, one a line. While the disk is full, rows wait in memory; they are written once there is room.

    Args:
        path: the file, which is made if it is not there. Half a last line, which a killed run may have left, is cut
            off: its row comes again.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        if path.exists():
            _end_last_line(path)
        self._file = path.open("ab", buffering=0)
        self._waiting = b""
        self._is_full = False

    def add(self, row: Mapping[str, Any]) -> None:
        """Write one more row, or have it wait."""
        self._waiting += json.dumps(row).encode() + b"\n"
        self._write()

    def text(self) -> str:
        """All rows, those that wait included."""
        return (self._path.read_bytes() + self._waiting).decode()

    def close(self) -> None:
        """No row comes any more."""
        self._write()
        if self._waiting:
            logger.error("%s: rows that found no room: %s", self._path, self._waiting.decode())
        self._file.close()

    def _write(self) -> None:
        try:
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]
        except OSError as error:
            if not is_full(error):
                raise
            if not self._is_full:
                wanted = room_wanted(self._path, len(self._waiting))
                logger.error("%s %s; rows wait in memory, and the training continues: free some", self._path, wanted)
            self._is_full = True
            return
        if self._is_full:
            logger.warning("%s has room again: all rows are written", self._path)
        self._is_full = False


def restore(path: Path, stored: str | None) -> None:
    """Bring a file of rows back from its copy in the store: it was lost, or a job elsewhere has gone on since.

    Args:
        stored: the copy, whole rows of which no two are the same, as each has its time; None: there is none.
    """
    if stored and not (path.exists() and stored.splitlines()[-1] in path.read_text(errors="replace")):
        write_atomically(path, stored)  # half of it would be all that is copied next


def _end_last_line(path: Path) -> None:
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        logger.warning("%s: its last line was incomplete and is removed: %r", path, content[whole:])
        with path.open("r+b") as file:
            file.truncate(whole)
