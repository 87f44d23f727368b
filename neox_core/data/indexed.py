"""Token files in the Megatron / GPT-NeoX mmap format: `<prefix>.bin` holds ids, `<prefix>.idx` says where they lie.

`.idx`, little-endian: b"MMIDIDX\\0\\0", u64 version 1, u8 dtype code, u64 sequences, u64 length of the document index,
i32 sizes in tokens, i64 offsets in bytes, i64 document index (sequence at which each document starts, then their
number). One sequence is one document here, as GPT-NeoX's preprocess_data writes.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from neox_core.errors import DataError
from neox_core.storage.atomic import atomic_files

Tokens = np.ndarray[Any, np.dtype[Any]]

_MAGIC = b"MMIDIDX\x00\x00"
_VERSION = 1
_INDEX_ROWS = 1 << 20
HEADER = struct.Struct("<9sQBQQ")
_DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f4", 7: "<f8", 8: "<u2"}
_CODES = {np.dtype(name): code for code, name in _DTYPES.items()}


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The type of an id on disk, by Megatron's rule: u16 below 65,500 pieces, else i32."""
    return np.dtype("<u2" if vocab_size < 65_500 else "<i4")


def bin_path(prefix: Path) -> Path:
    """The file of ids."""
    return prefix.with_name(f"{prefix.name}.bin")


def idx_path(prefix: Path) -> Path:
    """The file that says where each sequence lies."""
    return prefix.with_name(f"{prefix.name}.idx")


class IndexedWriter:
    """Writes one dataset; a context manager. Nothing lies under the final names before it closes without an error."""

    def __init__(self, prefix: Path, dtype: np.dtype[Any]) -> None:
        self._prefix, self._dtype = prefix, np.dtype(dtype)
        self._sizes = array("i")

    def __enter__(self) -> IndexedWriter:
        with ExitStack() as stack:
            temporary_bin, self._idx = stack.enter_context(atomic_files(dataset_paths(self._prefix), durable=False))
            self._file: BinaryIO = temporary_bin.open("wb")
            stack.push(self._close)
            self._stack = stack.pop_all()
        return self

    def add_document(self, ids: Tokens | Sequence[int]) -> None:
        """Append one document.

        Raises:
            DataError: an id does not fit the dtype.
        """
        given = np.asarray(ids)
        tokens = given.astype(self._dtype, copy=False)
        if given.dtype != self._dtype and not np.array_equal(tokens, given):
            raise DataError(
                f"document {len(self._sizes)} of {self._prefix} has ids from {given.min()} to {given.max()}, "
                f"which {self._dtype.name} cannot hold: use a wider type"
            )
        self._file.write(np.ascontiguousarray(tokens).data)
        self._sizes.append(len(tokens))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def _close(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if kind is None:
            with self._idx.open("wb") as file:
                _write_index(file, self._dtype, np.frombuffer(self._sizes, dtype=np.int32))


class IndexedDataset:
    """Reads one dataset through mmap; opening costs the same for any size."""

    def __init__(self, prefix: Path) -> None:
        """Open `<prefix>.bin` and `<prefix>.idx`.

        Raises:
            DataError: a file is missing, is not in the format, or the two don't fit each other.
        """
        self.prefix = Path(prefix)
        for path in dataset_paths(self.prefix):
            if not path.is_file():
                raise DataError(f"token file {path} does not exist: run prepare-data")
        index = idx_path(self.prefix)
        with index.open("rb") as file:
            self.dtype, sequences, documents = _read_header(file.read(HEADER.size), index)
        _check_size(index, HEADER.size + sequences * (4 + 8) + documents * 8)
        raw = np.memmap(index, dtype=np.uint8, mode="r").view(np.ndarray)
        self.sizes: Tokens = raw[HEADER.size :][: 4 * sequences].view("<i4")
        """i32 [sequences], in tokens."""
        self.offsets: Tokens = raw[HEADER.size + 4 * sequences :][: 8 * sequences].view("<i8")
        """i64 [sequences], in bytes."""
        self.document_index: Tokens = raw[HEADER.size + 12 * sequences :].view("<i8")
        """i64 [documents + 1]: first sequence of each document, then the number of sequences."""
        self._check_ends()
        self.tokens: Tokens = _map_tokens(bin_path(self.prefix), self.dtype)
        """All ids in order, [tokens]."""

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: int) -> Tokens:
        """Ids of one sequence."""
        start = int(self.offsets[index]) // self.dtype.itemsize
        return self.tokens[start : start + int(self.sizes[index])]

    def _check_ends(self) -> None:
        # Only the ends, so that opening 10^9 documents costs no more than opening one.
        used = int(self.offsets[-1]) + int(self.sizes[-1]) * self.dtype.itemsize if len(self.sizes) else 0
        _check_size(bin_path(self.prefix), used)
        if len(self.sizes) and int(self.offsets[0]) != 0:
            raise DataError(
                f"{idx_path(self.prefix)} is damaged (first offset {self.offsets[0]}, not 0): make it again"
            )
        if not len(self.document_index) or int(self.document_index[-1]) != len(self.sizes):
            raise DataError(
                f"{idx_path(self.prefix)} is damaged (its document index does not end at sequence "
                f"{len(self.sizes)}): make it again"
            )


def dataset_paths(prefix: Path) -> tuple[Path, Path]:
    """A dataset's files, of which readers open the .idx, the last, first."""
    return bin_path(prefix), idx_path(prefix)


def index_header(dtype: np.dtype[Any], count: int) -> bytes:
    """First bytes of an .idx for that many documents of one sequence each."""
    return HEADER.pack(_MAGIC, _VERSION, _CODES[dtype], count, count + 1)


def _write_index(file: BinaryIO, dtype: np.dtype[Any], sizes: Tokens) -> None:
    count, begin = len(sizes), 0
    file.write(index_header(dtype, count))
    file.write(np.ascontiguousarray(sizes, dtype="<i4").data)
    for first in range(0, count, _INDEX_ROWS):  # in pieces, so that many documents take little memory
        lengths = sizes[first : first + _INDEX_ROWS].astype(np.int64) * dtype.itemsize
        ends = begin + np.cumsum(lengths)
        file.write((ends - lengths).astype("<i8").tobytes())
        begin = int(ends[-1])
    for first in range(0, count + 1, _INDEX_ROWS):
        file.write(np.arange(first, min(first + _INDEX_ROWS, count + 1), dtype="<i8").tobytes())


def _read_header(header: bytes, path: Path) -> tuple[np.dtype[Any], int, int]:
    if len(header) < HEADER.size:
        raise DataError(f"{path} is too short for an index ({len(header)} bytes): make it again")
    magic, version, code, sequences, documents = HEADER.unpack(header)
    if magic != _MAGIC:
        raise DataError(f"{path} does not begin with {_MAGIC!r} but {magic!r}: it is not a Megatron mmap index")
    if version != _VERSION:
        raise DataError(f"{path} has index version {version}; only version {_VERSION} can be read")
    if code not in _DTYPES:
        raise DataError(f"{path} has dtype code {code}; known codes: {', '.join(map(str, _DTYPES))}")
    return np.dtype(_DTYPES[code]), sequences, documents


def _check_size(path: Path, expected: int) -> None:
    size = path.stat().st_size
    if size != expected:
        raise DataError(
            f"{path} has {size} bytes where its index says {expected}: truncated or not its own; make it again"
        )


def _map_tokens(path: Path, dtype: np.dtype[Any]) -> Tokens:
    if path.stat().st_size == 0:  # mmap refuses an empty file
        return np.empty(0, dtype)
    return np.memmap(path, dtype=dtype, mode="r").view(np.ndarray)
