"""One record: a JSON object on a line of its own, of which one key holds the text."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from neox_core.errors import DataError

_LONGEST_REASON = 200
MAX_UNBROKEN = 6 << 20
"""Characters in a row without a blank or line feed: an encoder needs some 50 bytes of memory for each of them."""

_TOO_LONG = re.compile(rf"(?<![^ \n])[^ \n]{{{MAX_UNBROKEN + 1}}}")  # from the beginning of a word only: linear


class Document(NamedTuple):
    """One record's text."""

    text: str
    bytes: int
    """Length of the text in UTF-8."""
    line: int
    """Line of the (decompressed) file, from 1; of a parquet file the row, from 1."""

    @property
    def is_empty(self) -> bool:
        """It holds nothing to learn from."""
        return not self.text or self.text.isspace()


class Rejection(NamedTuple):
    """One record that holds no text that can be used."""

    line: int
    reason: str


class _FileError(DataError):
    """An error of a file, whose reason also holds for the place that the file was fetched from."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[Any, ...]:
        # Exceptions that cross processes are rebuilt from their message alone otherwise.
        return _rebuilt, (type(self), str(self), self.reason)


class DamagedFileError(_FileError):
    """A file that cannot be read to its end."""

    def __init__(self, path: Path | str, reason: str) -> None:
        super().__init__(
            f"{path} is damaged ({reason}): correct it or fetch it again, or set data.skip_damaged_files", reason
        )


class WrongColumnError(_FileError):
    """A file whose texts are not in the column that was named."""

    def __init__(self, path: Path | str, reason: str) -> None:
        super().__init__(f"{path} {reason}: correct data.text_key", reason)


def parse_record(line: bytes, number: int, key: str) -> Document | Rejection:
    """The document of one line, or why there is none. Other keys may hold what JSON has no word for, such as NaN."""
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError:
        try:
            # orjson takes no NaN, and no number or depth past its limits, though the text may be fine.
            record = json.loads(line.decode("utf-8"), parse_int=float)
        except UnicodeDecodeError as error:
            return Rejection(number, f"it is not UTF-8 ({error.reason} at byte {error.start})")
        except RecursionError:
            return Rejection(number, "it is not JSON that can be read (nested too deep)")
        except ValueError as error:
            return Rejection(number, f"it is not JSON, one record per line ({error})"[:_LONGEST_REASON])
    if not isinstance(record, dict):
        return Rejection(number, f"it is a {type(record).__name__}, not an object")
    if key not in record:
        return Rejection(number, f'it has no "{key}", only {_named(record)}'[:_LONGEST_REASON])
    return checked_text(record[key], number, key)


def checked_text(text: object, number: int, key: str) -> Document | Rejection:
    """The document of a value, or why it is none."""
    if not isinstance(text, str):
        return Rejection(number, f'its "{key}" is of type {type(text).__name__}, not a string')
    try:
        size = len(text) if text.isascii() else len(text.encode("utf-8"))
    except UnicodeEncodeError as error:
        return Rejection(number, f'its "{key}" holds a lone surrogate at character {error.start}')
    if len(text) > MAX_UNBROKEN and _TOO_LONG.search(text):
        return Rejection(number, f'its "{key}" has more than {MAX_UNBROKEN} characters in a row without a blank')
    return Document(text, size, number)


def _named(record: dict[str, Any]) -> str:
    return ", ".join(map(repr, record)) or "nothing"


def _rebuilt(kind: type[_FileError], message: str, reason: str) -> _FileError:
    error = kind.__new__(kind)
    _FileError.__init__(error, message, reason)
    return error
