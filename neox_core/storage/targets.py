"""Folders that a conversion writes to: on a local disk or in an object store; each file appears whole or not at all."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from io import RawIOBase
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol

from neox_core.errors import CheckpointError, StorageError
from neox_core.storage.atomic import atomic_file, remove_remains, write_atomically
from neox_core.storage.digest import sha256_of
from neox_core.storage.folders import Folder, LocalFolder, Location, S3Folder, named_place, storage_at
from neox_core.storage.object_store import ObjectStore
from neox_core.storage.s3_target import INCOMING, Put, S3Target

_LOCK_FILE = ".conversion.lock"
_WRITE_BACK_BYTES = 1 << 25
"""After so many the disk is asked to begin, so that not all is left to the end."""


class Target(Folder, Protocol):
    """A folder to write to; paths are relative to it, with slashes."""

    def files(self) -> list[str]:
        """Paths of all files in it and below but hidden ones, sorted."""
        ...

    def create(self, path: str, size: int) -> AbstractContextManager[Put]:
        """Takes a file's bytes, about `size`; the file appears, complete, when the block ends without an error."""
        ...

    def write(self, path: str, content: bytes) -> None:
        """Write a small file."""
        ...

    def remove(self, path: str) -> None:
        """Remove a file if it is there."""
        ...

    def remove_remains(self, paths: Sequence[str]) -> None:
        """Remove what a killed attempt had half written of these files."""
        ...

    def check_space(self, needed: int) -> None:
        """Raise StorageError if it is known that so many bytes do not fit."""
        ...

    def mark(self, path: str) -> str:
        """What identifies a file's content later: SHA-256, or the store's own mark. Empty: there is none."""
        ...

    def digest(self, path: str) -> tuple[int, str]:
        """Size and SHA-256 of a file; reads it."""
        ...

    def locked(self) -> AbstractContextManager[None]:
        """Keep other conversions out of it; raises CheckpointError if one is at work."""
        ...

    def check_usable(self) -> None:
        """Raise StorageError if it is known that nothing can be written there."""
        ...

    def incoming(self) -> Target:
        """A hidden folder in it, for what is to replace its files once it is complete and proven."""
        ...

    def take_over(self, path: str) -> None:
        """Move a file of `incoming` to the same path here."""
        ...

    def clear_beside(self) -> None:
        """Remove the hidden folder."""
        ...


class LocalTarget(LocalFolder):
    """A folder on a local disk."""

    def files(self) -> list[str]:
        """All files but hidden ones."""
        found = [path.relative_to(self.path) for path in self.path.rglob("*") if path.is_file()]
        return sorted(path.as_posix() for path in found if not any(part.startswith(".") for part in path.parts))

    @contextmanager
    def create(self, path: str, size: int) -> Iterator[Put]:
        """A file that is on the disk when it appears."""
        final = self.path / path
        try:
            with atomic_file(final) as temporary, temporary.open("wb", buffering=0) as file:
                yield partial(_append, file)
        except OSError as error:
            raise StorageError(f"{final} cannot be written: {error.strerror or error}") from error

    def write(self, path: str, content: bytes) -> None:
        """Write a small file."""
        write_atomically(self.path / path, content)

    def remove(self, path: str) -> None:
        """Remove a file."""
        (self.path / path).unlink(missing_ok=True)

    def remove_remains(self, paths: Sequence[str]) -> None:
        """Remove temporary files."""
        for path in paths:
            remove_remains(self.path / path)

    def check_space(self, needed: int) -> None:
        """Compare with what the disk has left."""
        folder = next(path for path in (self.path, *self.path.parents) if path.exists())
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise StorageError(
                f"{self.path} needs {needed:,} more bytes ({needed / 1e9:.1f} GB), but its disk has {free:,} "
                f"({free / 1e9:.1f} GB) left: free {(needed - free) / 1e9:.1f} GB or choose another folder"
            )

    def mark(self, path: str) -> str:
        """SHA-256."""
        file = self.path / path
        return sha256_of(file) if file.is_file() else ""

    def digest(self, path: str) -> tuple[int, str]:
        """Size and SHA-256."""
        return (self.path / path).stat().st_size, sha256_of(self.path / path)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """By a lock that the kernel drops when the process dies."""
        with _storage_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            lock = (self.path / _LOCK_FILE).open("a")
        with lock as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise CheckpointError(
                    f"another conversion is writing to {self}: wait for it, or choose another folder"
                ) from None
            yield

    def check_usable(self) -> None:
        """Whether it is a folder, or may become one."""
        with _storage_errors(self.path):
            folder = next(path for path in (self.path, *self.path.parents) if path.exists())
            if not folder.is_dir():
                raise StorageError(f"{folder} is a file: name a folder to write to")
            TemporaryDirectory(dir=folder, prefix=".").cleanup()  # permissions alone do not tell

    def incoming(self) -> LocalTarget:
        """On the same disk, so that files can be renamed."""
        return LocalTarget(self.path / INCOMING)

    def take_over(self, path: str) -> None:
        """Rename."""
        with _storage_errors(self.path / path):
            (self.path / path).parent.mkdir(parents=True, exist_ok=True)
            (self.path / INCOMING / path).replace(self.path / path)

    def clear_beside(self) -> None:
        """With all that is in it."""
        shutil.rmtree(self.path / INCOMING, ignore_errors=True)


@contextmanager
def _storage_errors(path: Path) -> Iterator[None]:
    """What the disk refuses, in one line: read-only, a file in the way, a name that is too long."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror or error}: choose another folder") from None


def _append(file: RawIOBase, view: memoryview) -> None:
    """Write all of a buffer."""
    start = file.tell()
    written = 0
    while written < len(view):
        written += file.write(view[written:]) or 0
    if start // _WRITE_BACK_BYTES != (start + written) // _WRITE_BACK_BYTES:
        # Linux begins to write dirty pages of the range to the disk, and does not wait for them.
        first = max(0, start - _WRITE_BACK_BYTES)
        os.posix_fadvise(file.fileno(), first, start + written - first, os.POSIX_FADV_DONTNEED)


def open_target(location: Location) -> Target:
    """The folder of any location, to write to."""
    if isinstance(location, S3Folder):
        return S3Target(location.store, location.prefix)
    if isinstance(location, LocalFolder):
        return LocalTarget(location.path)
    place = named_place(location) if isinstance(location, str) else location
    if isinstance(place, str):
        return S3Target(ObjectStore(storage_at(place)))
    assert isinstance(place, Path)
    return LocalTarget(place)
