"""Folders that a conversion writes to: on a local disk or in an object store; each file appears whole or not at all."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from io import RawIOBase
from pathlib import Path
from typing import Protocol

from neox_core.artifact import sha256_of
from neox_core.errors import CheckpointError, StorageError
from neox_core.storage.atomic import atomic_file, remove_remains, write_atomically
from neox_core.storage.folders import Folder, LocalFolder, Location, S3Folder, storage_at
from neox_core.storage.object_store import ObjectStore

_LOCK_FILE = ".conversion.lock"
_WRITE_BACK_BYTES = 1 << 25
"""After so many the disk is asked to begin, so that not all is left to the end."""
_PART_BYTES, _MOST_PARTS = 1 << 24, 10_000
"""Of an upload, which is in memory part by part; S3 allows no more of them."""

Put = Callable[[memoryview], None]
"""Takes a file's next bytes."""


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


class LocalTarget(LocalFolder):
    """A folder on a local disk."""

    def files(self) -> list[str]:
        """All files but hidden ones."""
        found = [path for path in self.path.rglob("*") if path.is_file() and not path.name.startswith(".")]
        return sorted(path.relative_to(self.path).as_posix() for path in found)

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
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / _LOCK_FILE).open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise CheckpointError(
                    f"another conversion is writing to {self}: wait for it, or choose another folder"
                ) from None
            yield


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


class S3Target(S3Folder):
    """Objects under one prefix."""

    def files(self) -> list[str]:
        """All objects but hidden ones."""
        keys = [info.key.removeprefix(self.prefix) for info in self.store.list(self.prefix)]
        return [key for key in keys if not key.rpartition("/")[2].startswith(".")]

    def create(self, path: str, size: int) -> AbstractContextManager[Put]:
        """An object that is sent in parts."""
        return self.store.uploading(self.prefix + path, max(_PART_BYTES, size // (_MOST_PARTS // 2)))

    def write(self, path: str, content: bytes) -> None:
        """Write a small object."""
        self.store.put_bytes(self.prefix + path, content)

    def remove(self, path: str) -> None:
        """Remove an object."""
        self.store.delete([self.prefix + path])

    def remove_remains(self, paths: Sequence[str]) -> None:
        """Drop the parts of uploads that never ended."""
        for path in paths:
            self.store.abort_uploads(self.prefix + path)

    def check_space(self, needed: int) -> None:
        """An object store does not say."""

    def mark(self, path: str) -> str:
        """The object's ETag and size."""
        key = self.prefix + path
        return next((f"{info.etag} {info.size}" for info in self.store.list(key) if info.key == key), "")

    def digest(self, path: str) -> tuple[int, str]:
        """Size and SHA-256."""
        content = self.content(path)
        digest = hashlib.sha256()
        with content.open() as stream:
            while piece := stream.read(1 << 22):
                digest.update(piece)
        return content.size, digest.hexdigest()

    def locked(self) -> AbstractContextManager[None]:
        """Not all object stores can: nothing is kept out."""
        return nullcontext()


def open_target(location: Location) -> Target:
    """The folder of any location, to write to."""
    if isinstance(location, S3Folder):
        return S3Target(location.store, location.prefix)
    if isinstance(location, LocalFolder):
        return LocalTarget(location.path)
    if isinstance(location, str) and location.startswith("s3://"):
        return S3Target(ObjectStore(storage_at(location)))
    assert isinstance(location, str | Path)
    return LocalTarget(Path(location))
