"""Lines of a file, plain or compressed, in bounded memory."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, cast

from backports import zstd

from neox_core.data.tokenization.readers.record import DamagedFileError
from neox_core.storage.stand_ins import stand_in

COMPRESSIONS = (".zst", ".zstd", ".gz")
MAX_LINE = 16 << 20
"""Bytes. A longer line is passed over: it is a decompression bomb or has lost its line feeds."""
_READ_SIZE = 1 << 18
_MAX_WINDOW: dict[int, int] = {
    zstd.DecompressionParameter.window_log_max: 31
}  # zstd --long=31, which it refuses by default
_UTF8_MARK = b"\xef\xbb\xbf"
_BINARY_MARKS = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"PAR1": "parquet"}
_LONGEST_MARK = 4
_WIDE_MARKS = {b"\xff\xfe": "UTF-16 or UTF-32", b"\xfe\xff": "UTF-16", b"\x00\x00\xfe\xff": "UTF-32"}


def lines(path: Path, on_read: Callable[[int], None]) -> Iterator[tuple[int, bytes | None]]:
    """Number, from 1, and bytes of each line without its line feed; None for one that is longer than MAX_LINE.

    Cut at line feeds only: U+2028 and the like are text. A UTF-8 byte order mark at the start is passed over.

    Args:
        on_read: called now and then with the number of bytes, as stored, that have been read.

    Raises:
        DamagedFileError: the file is truncated, corrupt, of another kind than its name says, or in another encoding.
    """
    number, pending, size = 1, list[bytes](), 0
    for chunk in _unmarked(_chunks(path, on_read), path):
        first, *others = chunk.split(b"\n")
        size += len(first)
        pending = [*pending, first] if size <= MAX_LINE else []
        for piece in others:
            yield number, b"".join(pending) if size <= MAX_LINE else None
            number, pending, size = number + 1, [piece], len(piece)
    if size:
        yield number, b"".join(pending) if size <= MAX_LINE else None


def _unmarked(chunks: Iterator[bytes], path: Path) -> Iterator[bytes]:
    for position, chunk in enumerate(chunks):
        if position == 0:
            if instead := stand_in(chunk[:200]):
                raise DamagedFileError(path, f"it is {instead}")
            for mark, encoding in _WIDE_MARKS.items():
                if chunk.startswith(mark):
                    raise DamagedFileError(path, f"its text is {encoding}: convert it to UTF-8, with iconv for example")
            for mark, kind in _BINARY_MARKS.items():
                if chunk.startswith(mark):
                    raise DamagedFileError(path, f"it is {kind} inside, not JSON lines: unpack it, or name it so")
            if b"\0" in chunk[:4]:
                raise DamagedFileError(
                    path, "it begins with NUL bytes: convert UTF-16 to UTF-8, with iconv for example"
                )
            chunk = chunk.removeprefix(_UTF8_MARK)
        yield chunk


def _chunks(path: Path, on_read: Callable[[int], None]) -> Iterator[bytes]:
    """Decompressed content, piece by piece: however small the file, no piece is large."""
    try:
        if path.name.endswith(COMPRESSIONS):
            _check_packed(path)
        with path.open("rb") as stored, _decompressed(stored, path.name) as file:
            while chunk := file.read(_READ_SIZE):
                on_read(stored.tell())
                yield chunk
    except EOFError:
        raise DamagedFileError(path, "it is truncated: its last compressed frame does not end") from None
    except (zstd.ZstdError, gzip.BadGzipFile, zlib.error) as error:
        raise DamagedFileError(path, " ".join(str(error).split())) from None
    except OSError as error:
        raise DamagedFileError(path, f"it cannot be read: {error.strerror or error}") from None


def _check_packed(path: Path) -> None:
    """Say of a file that is not packed as its name says what it is."""
    with path.open("rb") as stored:
        first = stored.read(200)
    if not first:
        raise DamagedFileError(path, "it is empty (0 bytes), which no packed file is")
    if instead := stand_in(first):
        raise DamagedFileError(path, f"it is {instead}")
    expected = "gzip" if path.name.endswith(".gz") else "zstd"
    unmarked = "plain text" if _is_text(first) else expected
    found = next((kind for mark, kind in _BINARY_MARKS.items() if first.startswith(mark)), unmarked)
    if found != expected:
        raise DamagedFileError(path, f"it is {found}, not {expected}, whatever its name says: rename it")


def _is_text(start: bytes) -> bool:
    """Whether a file that has no format's mark begins as text does: without control characters."""
    return len(start) >= _LONGEST_MARK and not any(byte < 9 or 13 < byte < 32 for byte in start)


def _decompressed(stored: BinaryIO, name: str) -> BinaryIO:
    if name.endswith((".zst", ".zstd")):
        return cast("BinaryIO", zstd.ZstdFile(stored, options=_MAX_WINDOW))
    if name.endswith(".gz"):
        return cast("BinaryIO", gzip.open(stored))
    return stored
