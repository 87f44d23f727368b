"""Files of tensors written from start to end, without ever holding a whole one: what a sink of bytes needs.

`write_torch` makes what torch.save would make and torch.load(weights_only=True, mmap=True) reads; `write_safetensors`
the format of that name. Equal tensors give equal bytes: there are no times or random ids in either.
"""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from itertools import islice
from math import prod
from typing import Any, Protocol

import torch
from torch import Tensor

CHUNK_BYTES = 1 << 23
"""Of one tensor, read at a time."""
_CHUNKS_AHEAD = 4
"""Of one file, in memory in addition to the two that are being written: reading, hashing and writing overlap."""
_ALIGNMENT = 64
"""torch's: of each storage in the archive."""
_PADDING_ID = 0x4246
"""'FB', torch's id of the field of padding in a record's header."""
_LOCAL_HEADER = 30
_ZIP64_FIELD = 20
_ZIP64_SIZE = (1 << 31) - 1
_SAFETENSORS_NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
_STORAGES = {torch.bfloat16: torch.BFloat16Storage, torch.float16: torch.HalfStorage, torch.float32: torch.FloatStorage}


class Sink(Protocol):
    """Where a file's bytes go, in order."""

    def write(self, data: Any, /) -> int:
        """Take all of a buffer, which stays valid until the next call has returned; gives its size in bytes."""
        ...

    def flush(self) -> None:
        """Be done with what was taken."""
        ...


@dataclass(frozen=True)
class StreamedTensor:
    """A tensor that is computed some rows at a time; a vector counts as one row."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    fill: Callable[[Tensor, int], None]
    """Called with a matrix to fill and the number of its first row."""

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return prod(self.shape) * self.dtype.itemsize

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self.shape[-1] * self.dtype.itemsize

    @property
    def chunks(self) -> list[range]:
        """Its rows in the pieces in which they are made."""
        height = prod(self.shape) // self.shape[-1]
        step = max(1, CHUNK_BYTES // self.row_bytes)
        return [range(start, min(start + step, height)) for start in range(0, height, step)]


def filled(tensors: Sequence[StreamedTensor], pool: Executor) -> Iterator[memoryview]:
    """All tensors' bytes in order, chunk by chunk, made some chunks ahead in the pool's threads.

    Each chunk is valid until the next but one is asked for, so that a sink may still be at work on the last one.
    """
    pieces = iter([(tensor, rows) for tensor in tensors for rows in tensor.chunks])
    size = max([CHUNK_BYTES, *(tensor.row_bytes for tensor in tensors)])
    free = [torch.empty(size, dtype=torch.uint8) for _ in range(_CHUNKS_AHEAD + 2)]
    pending: deque[tuple[Future[Tensor], Tensor]] = deque()
    taken: deque[Tensor] = deque()

    def begin() -> None:
        for tensor, rows in islice(pieces, len(free)):
            buffer = free.pop()
            pending.append((pool.submit(_fill, tensor, rows, buffer), buffer))

    begin()
    try:
        while pending:
            future, buffer = pending.popleft()
            yield memoryview(future.result().numpy())  # type: ignore[arg-type]
            taken.append(buffer)
            if len(taken) > 1:
                free.append(taken.popleft())
            begin()
    finally:
        for future, _ in pending:
            future.cancel()


def _fill(tensor: StreamedTensor, rows: range, buffer: Tensor) -> Tensor:
    """Make some rows of a tensor; yields the part of the buffer that they take."""
    data = buffer[: len(rows) * tensor.row_bytes]
    tensor.fill(data.view(tensor.dtype).view(len(rows), -1), rows.start)
    return data


def write_torch(sink: Sink, tensors: Sequence[StreamedTensor], pool: Executor, under: str | None = None) -> None:
    """Write torch's archive of a dict of named tensors, or of {under: such a dict}. `pool`: see `filled`."""
    chunks = filled(tensors, pool)
    with zipfile.ZipFile(_WriteOnly(sink), "w", zipfile.ZIP_STORED) as archive:  # type: ignore[call-overload]
        _record(archive, "data.pkl", [memoryview(_pickled(tensors, under))])
        _record(archive, "byteorder", [memoryview(b"little")])
        for key, tensor in enumerate(tensors):
            _record(archive, f"data/{key}", islice(chunks, len(tensor.chunks)), tensor.nbytes)
        _record(archive, "version", [memoryview(b"3\n")])


def write_safetensors(sink: Sink, tensors: Sequence[StreamedTensor], pool: Executor) -> None:
    """Write safetensors' format: the header's size, the header (JSON), and the tensors one behind the other.

    `pool`: see `filled`.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.nbytes
        header[tensor.name] = {
            "dtype": _SAFETENSORS_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    sink.write(struct.pack("<Q", len(text)) + text)
    for chunk in filled(tensors, pool):
        sink.write(chunk)


def _record(archive: zipfile.ZipFile, name: str, chunks: Any, size: int = 0) -> None:
    """One record, its data aligned as torch aligns it: by a field of padding in its header."""
    info = zipfile.ZipInfo(f"archive/{name}")
    info.file_size = size
    stream: Any = archive.fp
    start = stream.tell() + _LOCAL_HEADER + len(info.filename) + 4
    start += _ZIP64_FIELD if size * 1.05 > _ZIP64_SIZE else 0  # as zipfile decides
    padding = -start % _ALIGNMENT
    info.extra = struct.pack("<HH", _PADDING_ID, padding) + b"Z" * padding
    with archive.open(info, "w") as record:
        for chunk in chunks:
            record.write(chunk)


class _WriteOnly:
    """A sink as zipfile wants it. It has no tell, so that zipfile writes sizes and CRCs behind each record's data."""

    def __init__(self, sink: Sink) -> None:
        self.write, self.flush = sink.write, sink.flush


class _Storage:
    """Stands for a storage of the archive while its pickle is written."""

    def __init__(self, key: int, tensor: StreamedTensor) -> None:
        self.key, self.tensor = key, tensor


class _Tensor:
    """Pickles as torch pickles a tensor that has the whole of a storage."""

    def __init__(self, key: int, tensor: StreamedTensor) -> None:
        self.storage, self.tensor = _Storage(key, tensor), tensor

    def __reduce__(self) -> tuple[Any, ...]:
        shape = self.tensor.shape
        strides = tuple(prod(shape[dim + 1 :]) for dim in range(len(shape)))
        return torch._utils._rebuild_tensor_v2, (self.storage, 0, shape, strides, False, OrderedDict())


class _Pickler(pickle.Pickler):
    def persistent_id(self, item: Any) -> Any:
        if not isinstance(item, _Storage):
            return None
        numel = prod(item.tensor.shape)
        return ("storage", _STORAGES[item.tensor.dtype], str(item.key), "cpu", numel)


def _pickled(tensors: Sequence[StreamedTensor], under: str | None) -> bytes:
    content: dict[str, Any] = {tensor.name: _Tensor(key, tensor) for key, tensor in enumerate(tensors)}
    stream = io.BytesIO()
    _Pickler(stream, protocol=2).dump(content if under is None else {under: content})
    return stream.getvalue()
