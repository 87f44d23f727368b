"""Files that appear whole or not at all: written under a temporary name in the same folder, then renamed.

Temporary names are hidden, end in `.tmp` and are never the same twice, so that threads, processes and hosts on a
shared disk that write the same file cannot write into each other's.
"""

from __future__ import annotations

import glob
import os
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

_TOKEN_DIGITS = 12


@contextmanager
def atomic_file(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """Yields the temporary name to write to; the file gets its own name when the block ends without an error.

    A failure leaves nothing behind and keeps an old file of that name.

    Args:
        durable: the content is on the disk before the name is, so that it outlives a power cut.
    """
    with atomic_files([path], durable=durable) as (temporary,):
        yield temporary


@contextmanager
def atomic_files(paths: Sequence[Path], *, durable: bool = True) -> Iterator[list[Path]]:
    """As `atomic_file`, for files of one folder that belong together.

    Old files are replaced so that a reader who opens the last of `paths` first never meets an old one with new others:
    it is removed before the others are replaced, and appears last.
    """
    paths[0].parent.mkdir(parents=True, exist_ok=True)
    token = uuid.uuid4().hex[:_TOKEN_DIGITS]
    temporaries = [path.with_name(f".{path.name}.{token}.tmp") for path in paths]
    with ExitStack() as cleaning:
        for temporary in temporaries:
            cleaning.callback(temporary.unlink, missing_ok=True)
        yield temporaries
        if durable:
            for temporary in temporaries:
                _flush(temporary)
        if len(paths) > 1:
            paths[-1].unlink(missing_ok=True)
        for temporary, path in zip(temporaries, paths, strict=True):
            temporary.replace(path)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a small file so that a reader sees the old one or the whole new one, also after a power cut."""
    with atomic_file(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def remove_remains(path: Path) -> None:
    """Remove what killed processes had written of a file; no process may be writing it now."""
    for remains in path.parent.glob(f".{glob.escape(path.name)}.{'[0-9a-f]' * _TOKEN_DIGITS}.tmp"):
        remains.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
