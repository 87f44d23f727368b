"""Tensors where they lie in files: found without reading them, and read piece by piece.

Only names, shapes and places are taken from a file's index (torch's zip archive, safetensors' header); no code in a
file is ever run. Values come through a mapping of the file, so that they fill the page cache and not the process's own
memory.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from neox_core.errors import CheckpointError
from neox_core.storage.stand_ins import stand_in

_ZIP_MAGIC = b"PK\x03\x04"
_SAFETENSORS_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_LARGEST_HEADER = 100_000_000
_READ_AHEAD = 1 << 17


class Content(Protocol):
    """A file's bytes, wherever it is."""

    @property
    def name(self) -> str:
        """What messages call it."""
        ...

    @property
    def size(self) -> int:
        """Bytes."""
        ...

    @property
    def version(self) -> str:
        """Changes when the content does, as far as can be told without reading it."""
        ...

    def open(self) -> BinaryIO:
        """A seekable stream."""
        ...

    def bytes_at(self, offset: int, count: int) -> Tensor:
        """`count` bytes from `offset` as a uint8 tensor, not to be written to."""
        ...


class LocalContent:
    """A file on a local disk, mapped when first read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = str(path)
        try:
            stat = path.stat()
        except FileNotFoundError:
            raise CheckpointError(f"checkpoint file {path} does not exist") from None
        self.size, self.version = stat.st_size, f"{stat.st_size} {stat.st_mtime_ns}"
        self._mapped: Tensor | None = None

    def open(self) -> BinaryIO:
        """Open for reading; raises CheckpointError where that fails."""
        try:
            return self.path.open("rb")
        except OSError as error:
            raise CheckpointError(
                f"checkpoint file {self.path} cannot be read: {error.strerror}: correct its permissions or copy it"
            ) from None

    def bytes_at(self, offset: int, count: int) -> Tensor:
        """A view of the mapped file."""
        if self._mapped is None:
            self._mapped = torch.from_file(str(self.path), shared=False, size=self.size, dtype=torch.uint8)
        if count >= _READ_AHEAD:  # page faults alone would read a cold file in small pieces
            with self.path.open("rb", buffering=0) as file:
                os.posix_fadvise(file.fileno(), offset, count, os.POSIX_FADV_WILLNEED)
        return self._mapped[offset : offset + count]


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file."""

    content: Content
    name: str
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def place(self) -> str:
        """For messages."""
        return f"{self.content.name}: {self.name}"

    @property
    def nbytes(self) -> int:
        """Bytes that it takes in the file."""
        return prod(self.shape) * self.dtype.itemsize

    def whole(self) -> Tensor:
        """All of it in its shape; not to be written to."""
        return self.read(range(prod(self.shape) // self.shape[-1]), range(self.shape[-1])).view(self.shape)

    def read(self, rows: range, columns: range) -> Tensor:
        """Some rows and columns (a vector is one row), both in steps of at least 1; not to be written to."""
        width = self.shape[-1]
        row_bytes = width * self.dtype.itemsize
        data = self.content.bytes_at(self.offset + rows[0] * row_bytes, (rows[-1] - rows[0] + 1) * row_bytes)
        if data.storage_offset() % self.dtype.itemsize:
            data = data.clone()  # safetensors' data may start anywhere
        matrix = data.view(self.dtype).view(-1, width)
        return matrix[:: rows.step, columns.start : columns.stop]


def open_tensors(content: Content) -> dict[str, Any]:
    """What a file of tensors holds by name: StoredTensors, and plain values; nested in torch's files as saved.

    Raises:
        CheckpointError: the file is truncated, damaged, or holds anything but plain data and tensors.
    """
    with content.open() as file:
        start = file.read(len(_ZIP_MAGIC))
        file.seek(0)
        try:
            return _open_torch(content, file) if start == _ZIP_MAGIC else _open_safetensors(content, file)
        except CheckpointError:
            raise
        except Exception as error:  # torch raises RuntimeError, UnpicklingError, EOFError, ValueError ... as it comes
            reason = " ".join(str(error).split())[:160]
            raise CheckpointError(
                f"checkpoint file {content.name} ({content.size} bytes) is damaged, truncated or not a file of tensors"
                f": copy it again ({reason})"
            ) from None


def _open_torch(content: Content, file: BinaryIO) -> dict[str, Any]:
    with FakeTensorMode():  # storages get an offset in the file instead of data
        tree = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(tree, dict):
        raise CheckpointError(f"checkpoint file {content.name} holds a {type(tree).__name__}, not named tensors")
    return {str(name): _located(content, str(name), value) for name, value in tree.items()}


def _located(content: Content, name: str, value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _located(content, str(key), item) for key, item in value.items()}
    if not isinstance(value, Tensor):
        return value
    storage: Any = value.untyped_storage()
    offset = int(storage._checkpoint_offset) + int(value.storage_offset()) * value.dtype.itemsize
    if not value.is_contiguous():
        raise CheckpointError(
            f"{content.name}: {name} is not contiguous (strides {value.stride()}): save it contiguous"
        )
    return _checked(StoredTensor(content, name, offset, tuple(value.shape), value.dtype))


def _open_safetensors(content: Content, file: BinaryIO) -> dict[str, Any]:
    start = file.read(64)
    if instead := stand_in(start):
        raise CheckpointError(f"checkpoint file {content.name} is {instead}")
    (length,) = struct.unpack("<Q", start[:8])
    file.seek(8)
    if length > min(content.size, _LARGEST_HEADER):
        raise ValueError("neither torch's nor safetensors' format")
    header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    tensors: dict[str, Any] = {}
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        dtype = _SAFETENSORS_DTYPES.get(entry["dtype"])
        if dtype is None:
            raise CheckpointError(f"{content.name}: {name} is {entry['dtype']}; weights must be bf16, fp16 or fp32")
        tensor = StoredTensor(content, name, 8 + length + start, tuple(entry["shape"]), dtype)
        if tensor.nbytes != end - start:
            raise ValueError(f"{name} takes {end - start} bytes, but its shape needs {tensor.nbytes}")
        tensors[name] = _checked(tensor)
    last = max((tensor.offset + tensor.nbytes for tensor in tensors.values()), default=8 + length)
    if last != content.size:  # which safetensors itself refuses
        raise ValueError(f"its tensors end at byte {last}")
    return tensors


def _checked(tensor: StoredTensor) -> StoredTensor:
    end = tensor.offset + tensor.nbytes
    if end > tensor.content.size:
        raise ValueError(f"{tensor.name} would end at byte {end}")
    return tensor
