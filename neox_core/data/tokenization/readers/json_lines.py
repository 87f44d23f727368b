"""JSON lines, plain or compressed: a record on each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from neox_core.data.tokenization.readers.lines import MAX_LINE, lines
from neox_core.data.tokenization.readers.record import Document, Rejection, parse_record


def json_records(path: Path, key: str, on_read: Callable[[int], None]) -> Iterator[Document | Rejection]:
    """Each line's record; lines of white space alone hold none.

    Raises:
        DamagedFileError: as `lines`.
    """
    for number, line in lines(path, on_read):
        if line is None:
            yield Rejection(number, f"its line is longer than {MAX_LINE} bytes")
        elif line and not line.isspace():
            yield parse_record(line, number, key)
