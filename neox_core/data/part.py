"""One input file's tokens: a part. Made atomically, and found again if it is of the same text and settings."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path

from neox_core.artifact import sha256_of, write_atomically
from neox_core.config import RunConfig, StorageConfig, TokenizerConfig
from neox_core.data.indexed import IndexedDataset, bin_path
from neox_core.data.overlap import load_items
from neox_core.data.part_files import PARTS, PartPaths, PartWriter, load_table
from neox_core.data.readers import DamagedFileError, InputFile, open_input, read_records
from neox_core.data.readers.inputs import content_digest
from neox_core.data.tokenizer import Tokenizer
from neox_core.errors import DataError


@dataclass(frozen=True)
class PartSettings:
    """What a part depends on beside its text, and how to reach that."""

    tokenizer: TokenizerConfig
    storage: StorageConfig
    text_key: str
    skip_damaged_files: bool
    deduplicate: bool
    evaluation_sets: tuple[Path, ...]
    overlap_words: int

    @classmethod
    def of(cls, config: RunConfig) -> PartSettings:
        """The settings of a run."""
        data = config.data
        return cls(
            config.tokenizer,
            config.storage,
            data.text_key,
            data.skip_damaged_files,
            data.deduplicate,
            data.evaluation_sets,
            data.overlap_words,
        )

    def logical(self) -> dict[str, str]:
        """What the part's content depends on."""
        return {
            "tokenizer": sha256_of(self.tokenizer.model),
            "end_of_document": self.tokenizer.end_of_document,
            "begin_of_document": str(self.tokenizer.begin_of_document),
            "text_key": self.text_key,
            "skip_damaged_files": str(self.skip_damaged_files),
            "deduplicate": str(self.deduplicate),
            "evaluation_sets": " ".join(sha256_of(path) for path in self.evaluation_sets),
            "overlap_words": str(self.overlap_words),
        }


@dataclass(frozen=True)
class PartRecord:
    """What a part holds and what it was made from; written last."""

    documents: int
    bytes: int
    tokens: int
    rejected: int
    damaged: str
    """Why the file was left out as a whole; empty if it was not."""
    engine: str
    verified: int
    """Documents whose ids were compared with SentencePiece's."""
    bin_sha256: str
    made_from: dict[str, str]


def make_part(file: InputFile, settings: PartSettings, folder: Path) -> PartRecord:
    """Make one file's part, or find it made. Memory is bounded whatever the file's size.

    Raises:
        DataError: the file is damaged (and is not to be skipped), or an id is not SentencePiece's.
        ConfigError, StorageError: the tokenizer, an evaluation set or an object cannot be read.
    """
    paths = PartPaths.of(file, folder)
    made_from = {"text": content_digest(file), **settings.logical()}
    if found := find_part(paths, made_from):
        return found
    tokenizer, damaged = _tokenizer(settings.tokenizer, made_from["tokenizer"]), ""
    try:
        writer = _written(file, settings, paths, tokenizer, folder / PARTS)
    except DamagedFileError as error:
        if not settings.skip_damaged_files:
            raise DamagedFileError(file.location, error.reason) from None
        damaged = error.reason
        with PartWriter(file, paths, tokenizer) as writer:
            writer.leave_out(damaged)
    record = PartRecord(
        documents=len(writer),
        bytes=writer.bytes,
        tokens=writer.tokens,
        rejected=writer.rejected,
        damaged=damaged,
        engine=tokenizer.engine,
        verified=writer.verified,
        bin_sha256=sha256_of(bin_path(paths.prefix)),
        made_from=made_from,
    )
    write_atomically(paths.record, json.dumps(asdict(record)))
    return record


def _written(
    file: InputFile, settings: PartSettings, paths: PartPaths, tokenizer: Tokenizer, scratch: Path
) -> PartWriter:
    searched = settings.evaluation_sets and file.split == "train"
    items = load_items(settings.evaluation_sets, settings.overlap_words) if searched else None
    with (
        open_input(file, settings.storage, scratch) as path,
        PartWriter(file, paths, tokenizer, items, settings.deduplicate) as writer,
    ):
        for record in read_records(path, settings.text_key):
            writer.add(record)
    return writer


@lru_cache(maxsize=1)
def _tokenizer(config: TokenizerConfig, model_sha256: str) -> Tokenizer:
    """One per process; the digest is there so that a changed file is read again."""
    return Tokenizer(config)


def find_part(paths: PartPaths, made_from: dict[str, str]) -> PartRecord | None:
    """The record of a part that is whole and of the same text and settings; else None."""
    try:
        content = json.loads(paths.record.read_text())
        if set(content) != {field.name for field in fields(PartRecord)} or content["made_from"] != made_from:
            return None
        record = PartRecord(**content)
        whole = (
            len(IndexedDataset(paths.prefix)) == len(load_table(paths)) == record.documents
            and sha256_of(bin_path(paths.prefix)) == record.bin_sha256
            and paths.rejected.exists()
            and paths.overlaps.exists()
        )
    except (OSError, ValueError, TypeError, DataError):
        return None
    return record if whole else None
