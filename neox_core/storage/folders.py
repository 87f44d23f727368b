"""Folders of weights, on a local disk or in an object store, as conversions read them."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import BinaryIO, Protocol

import torch
from pydantic import ValidationError
from torch import Tensor

from neox_core.config import StorageConfig
from neox_core.config.paths import expanded, local_path
from neox_core.errors import CheckpointError, ConfigError, StorageError
from neox_core.storage.object_store import ObjectStore
from neox_core.storage.tensor_reader import Content, LocalContent

_BLOCK_BYTES = 1 << 22
_BLOCKS = 32
"""Of one folder's objects, kept in memory: what several files need at about the same time is fetched once."""


class Folder(Protocol):
    """A folder of files; `str` names it."""

    def exists(self) -> bool:
        """Whether there is such a folder; one in an object store must hold something."""
        ...

    def names(self) -> list[str]:
        """Its files and, where there are any, folders directly in it, sorted."""
        ...

    def read_text(self, name: str) -> str:
        """A small file; raises FileNotFoundError if there is none."""
        ...

    def content(self, name: str) -> Content:
        """A file to read pieces of; raises CheckpointError if there is none."""
        ...

    def sub(self, name: str) -> Folder:
        """A folder in it."""
        ...


class LocalFolder:
    """A folder on a local disk."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __str__(self) -> str:
        return str(self.path)

    def exists(self) -> bool:
        """Whether it is a folder."""
        return self.path.is_dir()

    def names(self) -> list[str]:
        """What is directly in it, sorted."""
        return sorted(path.name for path in self.path.iterdir())

    def read_text(self, name: str) -> str:
        """A small file."""
        return (self.path / name).read_text(encoding="utf-8")

    def content(self, name: str) -> Content:
        """A file, mapped."""
        return LocalContent(self.path / name)

    def sub(self, name: str) -> LocalFolder:
        """A folder in it."""
        return LocalFolder(self.path / name)


class S3Folder:
    """Objects under one prefix; a store's keys are relative to it. Objects are listed once, when first needed."""

    def __init__(self, store: ObjectStore, prefix: str = "") -> None:
        self.store, self.prefix = store, prefix
        self._blocks = lru_cache(_BLOCKS)(partial(_fetch, store))

    def __str__(self) -> str:
        return self.store.url(self.prefix).rstrip("/")

    def exists(self) -> bool:
        """Whether there is an object under the prefix."""
        return bool(self.store.list(self.prefix))

    def names(self) -> list[str]:
        """Objects, and the first parts of longer keys, sorted."""
        keys = [info.key.removeprefix(self.prefix) for info in self.store.list(self.prefix)]
        return sorted({key.split("/")[0] for key in keys})

    def read_text(self, name: str) -> str:
        """A small object."""
        text = self.store.get_text(self.prefix + name)
        if text is None:
            raise FileNotFoundError(f"{self}/{name} does not exist")
        return text

    def content(self, name: str) -> S3Content:
        """An object, read by ranges."""
        return S3Content(self.store, self.prefix + name, self._blocks)

    def sub(self, name: str) -> S3Folder:
        """The objects under a longer prefix."""
        return S3Folder(self.store, f"{self.prefix}{name}/")


def _fetch(store: ObjectStore, key: str, block: int) -> bytearray:
    return bytearray(store.get_range(key, block * _BLOCK_BYTES, _BLOCK_BYTES))


class S3Content:
    """An object, of which only the pieces that are asked for are fetched."""

    def __init__(self, store: ObjectStore, key: str, blocks: Callable[[str, int], bytearray]) -> None:
        self.name, self._key, self._blocks = store.url(key), key, blocks
        found = [info for info in store.list(key) if info.key == key]
        if not found:
            raise CheckpointError(f"checkpoint file {self.name} does not exist")
        self.size, self.version = found[0].size, f"{found[0].size} {found[0].etag}"

    def open(self) -> BinaryIO:
        """A seekable stream that fetches what is read."""
        return io.BufferedReader(_Ranges(self), 1 << 16)

    def digest(self, on_bytes: Callable[[int], None] = lambda _: None) -> str:
        """SHA-256 of the whole object.

        Args:
            on_bytes: called with the size of each piece that was read.
        """
        digest = sha256()
        with self.open() as stream:
            while piece := stream.read(_BLOCK_BYTES):
                digest.update(piece)
                on_bytes(len(piece))
        return digest.hexdigest()

    def bytes_at(self, offset: int, count: int) -> Tensor:
        """The bytes, from as few blocks as hold them."""
        parts = [torch.frombuffer(piece, dtype=torch.uint8) for piece in self.pieces(offset, count)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def pieces(self, offset: int, count: int) -> list[memoryview]:
        """The bytes as the blocks have them."""
        size = _BLOCK_BYTES
        found: list[memoryview] = []
        for block in range(offset // size, (offset + count - 1) // size + 1):
            data = self._blocks(self._key, block)
            start, stop = max(offset - block * size, 0), min(offset + count - block * size, size)
            if len(data) < stop:
                raise StorageError(f"{self.name} ends at byte {block * size + len(data)}: has it changed?")
            found.append(memoryview(data)[start:stop])
        return found


class _Ranges(io.RawIOBase):
    """An object as a stream."""

    def __init__(self, content: S3Content) -> None:
        self._content, self._at = content, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._content.size}[whence]
        self._at = base + offset
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        count = max(0, min(len(buffer), self._content.size - self._at))
        if count:
            buffer[:count] = b"".join(self._content.pieces(self._at, count))
        self._at += count
        return count


Location = Path | str | Folder
"""A local path, s3://bucket/prefix, or a folder that is open already."""


def storage_at(url: str, storage: StorageConfig | None = None) -> StorageConfig:
    """Access to s3://bucket/prefix: as `storage` has it, else as boto3 and other clients read the environment.

    Raises:
        ConfigError: the environment's endpoint is no address, or the URL names no bucket.
    """
    if storage is not None:
        return storage.model_copy(update={"url": url.rstrip("/")})
    environment = os.environ
    given = {
        "url": url.rstrip("/"),
        "endpoint_url": environment.get("AWS_ENDPOINT_URL_S3") or environment.get("AWS_ENDPOINT_URL"),
        "region": environment.get("AWS_REGION") or environment.get("AWS_DEFAULT_REGION") or "us-east-1",
    }
    try:
        return StorageConfig.model_validate(given)
    except ValidationError as error:
        problem = error.errors()[0]
        where = "AWS_ENDPOINT_URL" if problem["loc"] == ("endpoint_url",) else url
        raise ConfigError(f"{where}: {problem['msg'].removeprefix('Value error, ')}") from None


def check_exists(folder: Folder) -> None:
    """Refuse what is no folder.

    Raises:
        CheckpointError: there is nothing, or a file.
    """
    if folder.exists():
        return
    if isinstance(folder, LocalFolder) and folder.path.exists():
        raise CheckpointError(f"{folder} is a file: give the folder of the checkpoint that it belongs to")
    raise CheckpointError(f"checkpoint folder {folder} does not exist")


def open_folder(location: Location, storage: StorageConfig | None = None) -> Folder:
    """The folder of any location.

    Raises:
        ConfigError: it is empty, or names a variable or a user that is not there.
    """
    place = named_place(location) if isinstance(location, str) else location
    if isinstance(place, str):
        return S3Folder(ObjectStore(storage_at(place, storage)))
    return LocalFolder(place) if isinstance(place, Path) else place


def named_place(text: str) -> Path | str:
    """A local path, or s3://bucket/prefix, as a user has written it.

    Raises:
        ConfigError: see `open_folder`.
    """
    try:
        return expanded(text) if text.startswith("s3://") else local_path(text)
    except ValueError as error:
        raise ConfigError(f"folder: {error}") from None


@contextmanager
def small_files(location: Location) -> Iterator[Path]:
    """A local folder with a folder's files but for its weights: itself, or a copy while the block lasts."""
    folder = open_folder(location)
    if isinstance(folder, LocalFolder):
        yield folder.path
        return
    with TemporaryDirectory() as temporary:
        for name in folder.names():
            if name.endswith((".json", ".model")) and not name.startswith("."):
                with folder.content(name).open() as stream:
                    (Path(temporary) / name).write_bytes(stream.read())
        yield Path(temporary)


def file_versions(folder: Folder, files: Iterable[str]) -> dict[str, str]:
    """What identifies the content of each of a model's files in an object store, by name: its ETag and size, hashed.

    Small descriptions next to them count too (generation_config.json and the like).
    """
    names = {*files, *(name for name in folder.names() if name.endswith("config.json") and not name.startswith("."))}
    return {name: sha256(folder.content(name).version.encode()).hexdigest() for name in sorted(names)}
