"""Every record of a file, in order: a document, or a rejection that says why it is none."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from neox_core.data.tokenization.readers.formats import SourceFormat, format_of, source_formats
from neox_core.data.tokenization.readers.record import Document, Rejection
from neox_core.errors import DataError


def read_records(
    path: Path,
    key: str = "text",
    on_read: Callable[[int], None] = lambda read: None,
    formats: Sequence[SourceFormat] = (),
) -> Iterator[Document | Rejection]:
    """Stream the records of one file.

    Args:
        on_read: called now and then with the number of the file's bytes, as stored, that have been read.
        formats: those to choose the reader from, by the file's name; empty: all that are registered.

    Raises:
        DamagedFileError: the file cannot be read to its end; records before that point have been yielded by then.
        DataError: there is no such column, or no such format.
    """
    source_format = format_of(path.name, formats or source_formats())
    if source_format is None:
        raise DataError(f"{path} is of no format that can be read: convert it or register its format")
    yield from source_format.read(path, key, on_read)


def documents(path: Path, key: str = "text") -> Iterator[Document]:
    """The documents of a file that must have no bad record.

    Raises:
        DataError: a record is bad (named by line), or as `read_records`.
    """
    for record in read_records(path, key):
        if isinstance(record, Rejection):
            raise DataError(f"{path}, line {record.line}: bad record, {record.reason}: correct or remove it")
        yield record
