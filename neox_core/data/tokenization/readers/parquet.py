"""Texts of a parquet file, a row group's column at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from neox_core.data.tokenization.readers.lines import MAX_LINE
from neox_core.data.tokenization.readers.record import (
    DamagedFileError,
    Document,
    Rejection,
    WrongColumnError,
    checked_text,
)
from neox_core.errors import ConfigError
from neox_core.storage.stand_ins import stand_in

_READ_BYTES = 1 << 20
"""At a time, of a column; without it, a whole row group's."""


def parquet_records(path: Path, key: str, on_read: Callable[[int], None]) -> Iterator[Document | Rejection]:
    """Each row's text or why it has none. Holds a row, and of the file a page, which pyarrow decompresses whole.

    Args:
        on_read: called now and then with the share of the file's bytes that the rows so far make up.

    Raises:
        DamagedFileError: the file is truncated or corrupt.
        WrongColumnError: it has no such column, or one of another type.
        ConfigError: pyarrow is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ConfigError(f"reading {path} needs pyarrow: pip install 'llemma-pretrain[parquet]'") from None
    try:
        with path.open("rb") as stored:
            if instead := stand_in(stored.read(200)):
                raise DamagedFileError(path, f"it is {instead}")
        with pyarrow.parquet.ParquetFile(
            path, pre_buffer=False, memory_map=False, buffer_size=_READ_BYTES, page_checksum_verification=True
        ) as file:
            _check_column(file.schema_arrow, path, key)
            row, rows, size = 0, file.metadata.num_rows, path.stat().st_size
            for batch in file.iter_batches(batch_size=1, columns=[key], use_threads=False):
                for value in batch.column(0):
                    row += 1
                    yield _record(value, row, key)
                on_read(size * row // max(rows, 1))
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DamagedFileError(path, " ".join(str(error).split())[:200]) from None
    if row != rows:
        raise DamagedFileError(path, f"it has {row} rows of {rows}")


def _check_column(schema: Any, path: Path, key: str) -> None:
    if key not in schema.names:
        raise WrongColumnError(path, f"has no column {key!r}, only {', '.join(schema.names)}")
    kind = str(schema.field(key).type)
    if not ("string" in kind or kind == "null") or kind.startswith(("list", "large_list", "struct", "map")):
        raise WrongColumnError(path, f"has a column {key!r} that holds {kind}, not text")


def _record(value: Any, row: int, key: str) -> Document | Rejection:
    buffer = value.as_buffer() if hasattr(value, "as_buffer") else None
    if buffer is not None and buffer.size > MAX_LINE:
        return Rejection(row, f"its text is longer than {MAX_LINE} bytes")
    try:
        text = value.as_py()
    except UnicodeDecodeError as error:
        return Rejection(row, f"it is not UTF-8 ({error.reason} at byte {error.start})")
    return checked_text(text, row, key)
