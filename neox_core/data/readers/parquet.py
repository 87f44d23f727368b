"""Texts of a parquet file, a row group's column at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from neox_core.data.readers.record import DamagedFileError, Document, Rejection, checked_text
from neox_core.errors import ConfigError, DataError

_ROWS = 64


def parquet_records(path: Path, key: str) -> Iterator[Document | Rejection]:
    """Each row's text or why it has none. Memory: about one row group of that column.

    Raises:
        DamagedFileError: the file is truncated or corrupt.
        DataError: it has no such column, or one of another type.
        ConfigError: pyarrow is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ConfigError(f"reading {path} needs pyarrow: pip install 'llemma-pretrain[parquet]'") from None
    try:
        with pyarrow.parquet.ParquetFile(path, pre_buffer=False, memory_map=False) as file:
            _check_column(file.schema_arrow, path, key)
            row = 0
            for batch in file.iter_batches(batch_size=_ROWS, columns=[key], use_threads=False):
                for value in batch.column(0):
                    row += 1
                    yield _record(value, row, key)
    except (pyarrow.ArrowException, OSError) as error:
        raise DamagedFileError(path, " ".join(str(error).split())[:200]) from None


def _check_column(schema: object, path: Path, key: str) -> None:
    names = schema.names  # type: ignore[attr-defined]
    if key not in names:
        raise DataError(f"{path} has no column {key!r}, only {', '.join(names)}: correct data.text_key")


def _record(value: object, row: int, key: str) -> Document | Rejection:
    try:
        text = value.as_py()  # type: ignore[attr-defined]
    except UnicodeDecodeError as error:
        return Rejection(row, f"it is not UTF-8 ({error.reason} at byte {error.start})")
    return checked_text(text, row, key)
