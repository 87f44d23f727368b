"""Which formats text files may have: a reader each, chosen by the end of a file's name. More can be registered.

A reader is found here in the process that lists the files, and travels from there to the workers by the name of its
module: it has to be a function of a module that they can import.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from neox_core.data.tokenization.readers.json_lines import json_records
from neox_core.data.tokenization.readers.lines import COMPRESSIONS
from neox_core.data.tokenization.readers.parquet import parquet_records
from neox_core.data.tokenization.readers.record import Document, Rejection
from neox_core.errors import ConfigError

Reader = Callable[[Path, str, Callable[[int], None]], Iterator[Document | Rejection]]
"""Takes a file, the key or column of the text, and what to call now and then with the number of bytes read; yields
every record in order. Raises DamagedFileError if the file cannot be read to its end, and holds a record at a time."""


@dataclass(frozen=True)
class SourceFormat:
    """A format of text files."""

    suffixes: tuple[str, ...]
    """Ends of the names of its files, with the dot."""
    read: Reader


_JSON_LINES = tuple(f"{kind}{packed}" for kind in (".jsonl", ".json", ".ndjson") for packed in ("", *COMPRESSIONS))
_formats: dict[str, SourceFormat] = {}
"""By suffix."""


def register_source_format(source_format: SourceFormat) -> None:
    """Have files of these suffixes read by this reader, in every run that this process starts from now on.

    Raises:
        ConfigError: another reader has one of the suffixes.
    """
    for suffix in source_format.suffixes:
        if _formats.get(suffix, source_format) != source_format:
            raise ConfigError(f"files that end in {suffix} have a reader: register {source_format.read} for others")
    _formats.update(dict.fromkeys(source_format.suffixes, source_format))


def source_formats() -> tuple[SourceFormat, ...]:
    """All formats, in the order in which they were registered."""
    return tuple(dict.fromkeys(_formats.values()))


def format_of(name: str, formats: Iterable[SourceFormat]) -> SourceFormat | None:
    """The format of a file of that name; None if there is none."""
    return next((kind for kind in formats if name.endswith(kind.suffixes)), None)


register_source_format(SourceFormat(_JSON_LINES, json_records))
register_source_format(SourceFormat((".parquet",), parquet_records))
