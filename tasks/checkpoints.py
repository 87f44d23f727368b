"""Conversions between folders that belong to no run: `llemma convert` and `llemma export`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from neox_core.artifact import (
    ARTIFACT_FILE,
    Artifact,
    DigestCache,
    FileRecord,
    artifact_text,
    fingerprint,
    parse_artifact,
    sha256_of,
    software,
)
from neox_core.checkpoint.formats.outputs import journal_records
from neox_core.config import ModelConfig, ParallelConfig
from neox_core.progress import Progress
from neox_core.storage.folders import Folder, LocalFolder, file_versions, open_folder
from neox_core.storage.targets import LocalTarget, Target, open_target
from tasks.once import LocalPlace, build_unless_verified

ExportForm = Literal["huggingface", "meta"]
_DIGESTS = ".digests.json"


def convert_folder(
    source: str, target: str, parallel: ParallelConfig, vocab_multiple: int, progress: Progress
) -> Artifact:
    """Meta's or Hugging Face's weights to NeoX shards, proven; artifact.json comes last.

    Args:
        vocab_multiple: the vocabulary is padded to a multiple of it; exports cut the padding off again.

    Raises:
        CheckpointError, ConfigError, StorageError: see `convert` and `prove_conversion`.
    """
    from neox_core.checkpoint.conversion.convert import convert, open_source
    from neox_core.checkpoint.conversion.proof import prove_conversion

    checkpoint = open_source(source)
    base = checkpoint.model
    model = _padded(base, vocab_multiple)
    logical = {"model": model.model_dump(mode="json"), "parallel": parallel.model_dump(mode="json")}

    def build(folder: Target) -> Mapping[str, Any]:
        return convert(
            checkpoint.folder,
            folder,
            model,
            parallel,
            progress,
            base_vocab_size=base.vocab_size,
            prove=lambda checkpoint, shards: prove_conversion(checkpoint.folder, shards, model, progress),
        )

    return _once("convert", checkpoint.folder, open_target(target), logical, build)


def export_folder(
    source: str,
    target: str,
    form: ExportForm,
    model: ModelConfig | None,
    shards: int,
    tokenizer: Path | None,
    sequence_length: int,
    progress: Progress,
) -> Artifact:
    """A NeoX or training checkpoint to Hugging Face's or Meta's format, proven; artifact.json comes last.

    Args:
        model: its architecture; None: as the source's artifact.json records it.
        shards: number of files in Meta's format.
        tokenizer: SentencePiece model for a Hugging Face folder.

    Raises:
        CheckpointError, ConfigError, StorageError: see `export_huggingface`, `export_meta` and `prove_export`.
    """
    from neox_core.checkpoint.conversion.export import export_huggingface, export_meta, prove_export
    from neox_core.checkpoint.conversion.inspect import recorded_model
    from neox_core.checkpoint.formats.neox import NeoxCheckpoint

    opened = open_folder(source)
    known = model or recorded_model(opened)
    checkpoint = NeoxCheckpoint(opened)
    logical: dict[str, Any] = {"model": known.model_dump(mode="json"), "form": form, "sequence_length": sequence_length}
    logical |= {"shards": shards, "tokenizer": None if tokenizer is None else sha256_of(tokenizer)}

    def build(folder: Target) -> Mapping[str, Any]:
        if form == "meta":
            sizes = export_meta(opened, folder, known, shards, progress)
        else:
            sizes = export_huggingface(opened, folder, known, tokenizer, sequence_length, progress)
        return sizes | prove_export(checkpoint, folder, known, progress=progress)

    return _once("export", checkpoint.folder, open_target(target), logical, build)


def _padded(base: ModelConfig, multiple: int) -> ModelConfig:
    """The model with its vocabulary padded to a multiple."""
    size = -(-base.vocab_size // multiple) * multiple
    if size == base.vocab_size:
        return base
    return base.model_copy(update={"vocab_size": size, "unpadded_vocab_size": base.vocab_size})


def _once(
    name: str,
    source: Folder,
    target: Target,
    logical: Mapping[str, Any],
    build: Callable[[Target], Mapping[str, Any]],
) -> Artifact:
    """The artifact in `target`, built unless it is there and verifies."""
    local = LocalPlace(target.path, DigestCache(target.path / _DIGESTS)) if isinstance(target, LocalTarget) else None
    inputs = _inputs(source, local.cache if local else None)
    draft = Artifact(name, fingerprint(name, logical, inputs), inputs, logical, (), {})

    def build_and_remember() -> Mapping[str, Any]:
        summary = build(target)
        if local:
            local.cache.remember(local.folder, journal_records(target))
        return summary

    return build_unless_verified(draft, local or RemotePlace(target), build_and_remember)[0]


def _inputs(source: Folder, cache: DigestCache | None) -> dict[str, str]:
    """What tells the content of each of the source's files: SHA-256, or an object's ETag and size, hashed."""
    if isinstance(source, LocalFolder):
        paths = [path for path in sorted(source.path.iterdir()) if path.is_file() and not path.name.startswith(".")]
        digests = [sha256_of(path) for path in paths] if cache is None else cache.digests(paths)
        return {path.name: digest for path, digest in zip(paths, digests, strict=True)}
    return file_versions(source)


@dataclass(frozen=True)
class RemotePlace:
    """A prefix of an object store, whose files verify by their sizes."""

    target: Target

    def find(self, fingerprint: str) -> Artifact | None:
        """As `ArtifactPlace.find`."""
        try:
            found = parse_artifact(self.target.read_text(ARTIFACT_FILE), Path(str(self.target)))
        except (OSError, ValueError, TypeError, KeyError):
            return None
        expected = {record.path: record.size for record in found.files}
        sizes = {path: self.target.content(path).size for path in expected if self.target.mark(path)}
        return found if found.fingerprint == fingerprint and sizes == expected else None

    def publish(self, draft: Artifact) -> Artifact:
        """As `ArtifactPlace.publish`; what was written by this process is not read again."""
        known = {record.path: record for record in journal_records(self.target)}
        paths = [path for path in self.target.files() if path != ARTIFACT_FILE]
        records = tuple(known.get(path) or FileRecord(path, *self.target.digest(path)) for path in paths)
        artifact = replace(draft, files=records, software=software(), folder=Path(str(self.target)))
        self.target.write(ARTIFACT_FILE, artifact_text(artifact).encode())
        return artifact
