"""Files on a disk that fills up."""

from __future__ import annotations

import errno
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest


@dataclass
class Disk:
    """How many bytes are free."""

    free: int


class FileOnDisk(io.RawIOBase):
    """Takes what fits, as files do: the write after that fails."""

    def __init__(self, through: io.RawIOBase, disk: Disk) -> None:
        self._through, self._disk = through, disk

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        if self._disk.free <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = self._through.write(bytes(data)[: self._disk.free])
        assert written is not None
        self._disk.free -= written
        return written

    def close(self) -> None:
        self._through.close()
        super().close()


def put_on_disk(monkeypatch: pytest.MonkeyPatch, chosen: Callable[[Path], bool], new_disk: Callable[[], Disk]) -> None:
    """Let files that are opened for bytes, and chosen by their path, lie on such a disk."""
    through = Path.open

    def opened(path: Path, mode: str = "r", buffering: int = -1, *others: Any, **named: Any) -> Any:
        if mode not in ("ab", "wb") or not chosen(path):
            return through(path, mode, buffering, *others, **named)
        raw = FileOnDisk(through(path, mode, 0), new_disk())
        return raw if buffering == 0 else io.BufferedWriter(raw, buffer_size=64)

    monkeypatch.setattr(Path, "open", opened)
