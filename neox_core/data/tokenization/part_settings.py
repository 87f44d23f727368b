"""What a part is made with, and what is recorded of it. Imports little: each worker of a pool loads it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from neox_core.data.tokenization.filters.overlap import OverlapWords
from neox_core.data.tokenization.readers.formats import SourceFormat, source_formats
from neox_core.storage.digest import sha256_of

if TYPE_CHECKING:
    from neox_core.config import DataConfig, RunConfig, StorageConfig, TokenizerConfig


@dataclass(frozen=True)
class TokenizerSettings:
    """A TokenizerConfig's values, which travel to workers without pydantic."""

    model: Path
    end_of_document: str = "eos"
    begin_of_document: bool = False
    engine: str = "auto"

    @property
    def file(self) -> Path:
        """The tokenizer's file."""
        return self.model

    @classmethod
    def of(cls, config: TokenizerConfig) -> TokenizerSettings:
        """The values of a configuration."""
        return cls(config.file, config.end_of_document, config.begin_of_document, config.engine)


@dataclass(frozen=True)
class PartSettings:
    """What a part depends on apart from its text, and how to reach that."""

    tokenizer: TokenizerSettings
    storage: StorageConfig | None
    """Where s3:// inputs lie; None if there are none."""
    text_key: str = "text"
    skip_damaged_files: bool = False
    """A part that was left out as damaged is not tried again."""
    evaluation_sets: tuple[Path, ...] = ()
    overlap: OverlapWords = field(default_factory=lambda: OverlapWords(30, 8))
    signatures: bool = False
    """Near-duplicates are looked for."""
    formats: tuple[SourceFormat, ...] = field(default_factory=source_formats)
    """Readers that are registered where the settings are made, and so not where a worker uses them."""

    @classmethod
    def of(cls, config: RunConfig) -> PartSettings:
        """The settings of a run."""
        data = config.data
        return cls(
            TokenizerSettings.of(config.tokenizer),
            config.storage if _is_remote(data) else None,
            data.text_key,
            data.skip_damaged_files,
            data.evaluation_sets,
            OverlapWords(data.overlap_words, data.overlap_min_words),
            data.near_duplicates is not None,
        )

    def logical(self) -> dict[str, str]:
        """What the content of a part depends on, if its file is not damaged."""
        return {
            "tokenizer": sha256_of(self.tokenizer.model),
            "end_of_document": self.tokenizer.end_of_document,
            "begin_of_document": str(self.tokenizer.begin_of_document),
            "text_key": self.text_key,
            "evaluation_sets": " ".join(sha256_of(path) for path in self.evaluation_sets),
            "overlap": f"{self.overlap.run} {self.overlap.whole}",
            "signatures": str(self.signatures),
        }


class Done(NamedTuple):
    """How much has been tokenized."""

    stored: int
    """Bytes of the files, as stored."""
    bytes: int
    """Of text, in UTF-8."""
    tokens: int


@dataclass(frozen=True)
class PartRecord:
    """What a part holds and what it was made from; written last."""

    documents: int
    bytes: int
    tokens: int
    rejected: int
    empty: int
    """Records whose text is empty or blank; they are dropped."""
    damaged: str
    """Why the file was left out as a whole; empty if it was not."""
    engine: str
    verified: int
    """Documents whose ids were compared with SentencePiece's."""
    sha256: dict[str, str]
    """Of each of the part's files; they are not flushed to the disk, and a power cut may have cost any of them."""
    made_from: dict[str, str]


def _is_remote(data: DataConfig) -> bool:
    places = [data.input, *(where for source in data.sources.values() for where in source.files.values())]
    return any(place.startswith("s3://") for place in places)
