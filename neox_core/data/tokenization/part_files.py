"""The files of a part: ids, what was rejected, what overlaps, and a row per document."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from types import TracebackType
from typing import Any, TextIO

import numpy as np
from numpy.lib import format as npy

from neox_core.data.indexed import IndexedWriter, Tokens, bin_path, idx_path
from neox_core.data.tokenization.filters.duplicates import DOCUMENT, DocumentTable, text_hash
from neox_core.data.tokenization.filters.near_duplicates import PERMUTATIONS, Signatures, signature
from neox_core.data.tokenization.filters.overlap import EvaluationItems
from neox_core.data.tokenization.readers import Document, InputFile, Rejection
from neox_core.data.tokenization.tokenizer import Tokenizer
from neox_core.errors import DataError
from neox_core.storage.atomic import atomic_file
from neox_core.storage.digest import sha256_of

PARTS = ".parts"
"""Folder of the parts, until they are merged and the result is safe."""
_VERIFY_ONE_IN = 200
_ROW = struct.Struct("<4Q")
"""A DOCUMENT."""


@dataclass(frozen=True)
class PartPaths:
    """Where the files of a part lie until they are merged."""

    prefix: Path

    @classmethod
    def of(cls, file: InputFile, folder: Path) -> PartPaths:
        """Of the part of an input file, below a folder."""
        return cls(folder / PARTS / file.source / file.split / file.name)

    @property
    def record(self) -> Path:
        """The PartRecord."""
        return self._with(".json")

    @property
    def rejected(self) -> Path:
        """One line per record that was rejected."""
        return self._with(".rejected.jsonl")

    @property
    def overlaps(self) -> Path:
        """One line per evaluation text found in a document."""
        return self._with(".overlaps.jsonl")

    @property
    def documents(self) -> Path:
        """The DocumentTable."""
        return self._with(".documents.npy")

    @property
    def signatures(self) -> Path:
        """The documents' Signatures, or none of them."""
        return self._with(".signatures.npy")

    def digests(self) -> dict[str, str]:
        """SHA-256 of each of the files but the record, by name."""
        lists = (self.documents, self.signatures, self.rejected, self.overlaps)
        files = (bin_path(self.prefix), idx_path(self.prefix), *lists)
        return {path.name: sha256_of(path) for path in files}

    def _with(self, suffix: str) -> Path:
        return self.prefix.with_name(self.prefix.name + suffix)


class PartWriter:
    """Writes one part; a context manager. Nothing lies under the final names before it closes without an error.

    SentencePiece encodes the first document again, and further ones that make up to half a percent of the text.
    """

    def __init__(
        self,
        file: InputFile,
        paths: PartPaths,
        tokenizer: Tokenizer,
        items: EvaluationItems | None = None,
        signatures: bool = False,
    ) -> None:
        self._file, self._paths, self._tokenizer, self._items = file, paths, tokenizer, items
        self._signs = signatures
        self._documents = 0
        self._verified_bytes = 0
        self.bytes = self.tokens = self.rejected = self.empty = self.verified = 0
        """Of the text in UTF-8; ids; records that hold no usable text; records whose text is blank, which are dropped;
        documents compared with SentencePiece."""

    def __len__(self) -> int:
        """Documents so far."""
        return self._documents

    def __enter__(self) -> PartWriter:
        self._paths.prefix.parent.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            self._rejected = stack.enter_context(_renamed(self._paths.rejected, "w"))
            self._overlaps = stack.enter_context(_renamed(self._paths.overlaps, "w"))
            self._ids = stack.enter_context(IndexedWriter(self._paths.prefix, self._tokenizer.dtype))
            self._rows = stack.enter_context(TemporaryFile(dir=self._paths.prefix.parent))
            self._signatures = stack.enter_context(TemporaryFile(dir=self._paths.prefix.parent))
            stack.push(self._save_rows)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def add(self, record: Document | Rejection) -> None:
        """Append a document, or list a record that is none.

        Raises:
            DataError: an id of this document, which is named, is not SentencePiece's.
        """
        if isinstance(record, Rejection):
            self.rejected += 1
            _write_line(self._rejected, {"line": record.line, "reason": record.reason})
            return
        if record.is_empty:
            self.empty += 1
            return
        ids = self._tokenizer.encode_document(record.text)
        if not len(self) or (self._verified_bytes + record.bytes) * _VERIFY_ONE_IN <= self.bytes + record.bytes:
            self._verify(record, ids)
        for hit in self._items.hits(record.text) if self._items else ():
            found = {"set": hit.item.set_number, "item": hit.item.item, "field": hit.item.field}
            where = {"document": len(self), "line": record.line}
            _write_line(self._overlaps, {**found, **where, "words": hit.length, "text": hit.text})
        self._ids.add_document(ids)
        high, low = text_hash(record.text)
        self._rows.write(_ROW.pack(high, low, record.bytes, record.line))
        if self._signs:
            self._signatures.write(signature(record.text))
        self._documents += 1
        self.bytes, self.tokens = self.bytes + record.bytes, self.tokens + len(ids)

    def leave_out(self, reason: str) -> None:
        """List the file itself, of which nothing is taken."""
        _write_line(self._rejected, {"line": None, "reason": f"the file is damaged and left out: {reason}"})

    def _save_rows(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            _save_array(self._paths.documents, self._rows, DOCUMENT, (self._documents,))
            signatures = (self._documents if self._signs else 0, PERMUTATIONS)
            _save_array(self._paths.signatures, self._signatures, np.dtype("<u4"), signatures)

    def _verify(self, document: Document, ids: Tokens) -> None:
        try:
            self._tokenizer.verify_document(document.text, ids)
        except DataError as error:
            raise DataError(f"{self._file.location}, line {document.line}: {error}") from None
        self.verified, self._verified_bytes = self.verified + 1, self._verified_bytes + document.bytes


@contextmanager
def _renamed(path: Path, mode: str) -> Iterator[Any]:
    """A file that gets its name when it is complete. It may be lost in a power cut: see PartRecord.sha256."""
    with atomic_file(path, durable=False) as temporary, temporary.open(mode) as file:
        yield file


def _save_array(path: Path, content: Any, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
    content.seek(0)
    with _renamed(path, "wb") as file:
        npy.write_array_header_1_0(file, {"descr": npy.dtype_to_descr(dtype), "fortran_order": False, "shape": shape})
        shutil.copyfileobj(content, file)


def _write_line(file: TextIO, content: dict[str, Any]) -> None:
    file.write(json.dumps(content) + "\n")


def load_table(paths: PartPaths) -> DocumentTable:
    """What is kept of each of a part's documents."""
    return _load(paths.documents)


def load_signatures(paths: PartPaths) -> Signatures:
    """The signatures of a part's documents, if they were asked for."""
    return _load(paths.signatures)


def _load(path: Path) -> np.ndarray[Any, Any]:
    loaded: np.ndarray[Any, Any] = np.load(path, mmap_mode="r" if path.stat().st_size > 1 << 16 else None)
    return loaded
