"""Objects under one prefix, as conversions write to them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

from neox_core.storage.folders import S3Folder
from neox_core.storage.object_store import MOST_PARTS

INCOMING = ".incoming"
"""Folder of what is to replace a target's files."""
_PART_BYTES = 1 << 24
"""Of an upload, which is in memory part by part."""

Put = Callable[[memoryview], None]
"""Takes a file's next bytes."""


class S3Target(S3Folder):
    """Objects under one prefix."""

    def files(self) -> list[str]:
        """All objects but hidden ones."""
        keys = [info.key.removeprefix(self.prefix) for info in self.store.list(self.prefix)]
        return [key for key in keys if not any(part.startswith(".") for part in key.split("/"))]

    def create(self, path: str, size: int) -> AbstractContextManager[Put]:
        """An object that is sent in parts."""
        return self.store.uploading(self.prefix + path, max(_PART_BYTES, size // (MOST_PARTS // 2)))

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
        return content.size, content.digest()

    def locked(self) -> AbstractContextManager[None]:
        """Not all object stores can: nothing is kept out."""
        return nullcontext()

    def check_usable(self) -> None:
        """The store says so itself at the first request."""

    def incoming(self) -> S3Target:
        """Under a longer prefix."""
        return S3Target(self.store, f"{self.prefix}{INCOMING}/")

    def take_over(self, path: str) -> None:
        """Copied within the store."""
        self.store.copy(f"{self.prefix}{INCOMING}/{path}", self.prefix + path)

    def clear_beside(self) -> None:
        """All objects under the longer prefix."""
        self.store.delete([info.key for info in self.store.list(f"{self.prefix}{INCOMING}/")])
