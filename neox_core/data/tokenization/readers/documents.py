"""Every record of a file, in order: a document, or a rejection that says why it is none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from neox_core.data.tokenization.readers.lines import MAX_LINE, lines
from neox_core.data.tokenization.readers.parquet import parquet_records
from neox_core.data.tokenization.readers.record import DamagedFileError, Document, Rejection, parse_record
from neox_core.errors import DataError


def read_records(
    path: Path, key: str = "text", on_read: Callable[[int], None] = lambda read: None
) -> Iterator[Document | Rejection]:
    """Stream the records of one file. Lines of white space alone hold no record.

    Args:
        on_read: told now and then how many of the file's bytes, as stored, have been read.

    Raises:
        DamagedFileError: the file cannot be read to its end, or holds no record; records before that point have been
            yielded by then.
        DataError: a parquet file without that column.
    """
    found = False
    reader = parquet_records if path.name.endswith(".parquet") else _json_records
    for record in reader(path, key, on_read):
        found = True
        yield record
    if not found:
        raise DamagedFileError(path, "it holds no record")


def documents(path: Path, key: str = "text") -> Iterator[Document]:
    """The documents of a file that must have no bad record.

    Raises:
        DataError: a record is bad (named by line), or as `read_records`.
    """
    for record in read_records(path, key):
        if isinstance(record, Rejection):
            raise DataError(f"{path}, line {record.line}: bad record, {record.reason}: correct or remove it")
        yield record


def _json_records(path: Path, key: str, on_read: Callable[[int], None]) -> Iterator[Document | Rejection]:
    for number, line in lines(path, on_read):
        if line is None:
            yield Rejection(number, f"its line is longer than {MAX_LINE} bytes")
        elif line and not line.isspace():
            yield parse_record(line, number, key)
