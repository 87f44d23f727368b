"""A source format of the tests' own: a file is one text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from neox_core.data.tokenization.readers import Document, Rejection, SourceFormat


def whole_file(path: Path, key: str, on_read: Callable[[int], None]) -> Iterator[Document | Rejection]:
    content = path.read_bytes()
    on_read(len(content))
    yield Document(f"{key}: {content.decode()}", len(content), 1)


STORIES = SourceFormat((".story",), whole_file)
