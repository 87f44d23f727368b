"""Conversions between folders that belong to no run: `llemma convert` and `llemma export`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from neox_core.artifact import (
    ARTIFACT_FILE,
    Artifact,
    DigestCache,
    FileRecord,
    artifact_text,
    find_verified,
    fingerprint,
    parse_artifact,
    publish,
    sha256_of,
    software,
)
from neox_core.checkpoint.formats.outputs import journal_records
from neox_core.config import ModelConfig, ParallelConfig
from neox_core.progress import Progress
from neox_core.storage.folders import Folder, LocalFolder, file_versions, open_folder
from neox_core.storage.targets import LocalTarget, Target, open_target

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
    if not isinstance(target, LocalTarget):
        return _once_remote(name, source, target, logical, build)
    cache = DigestCache(target.path / _DIGESTS)
    inputs = _inputs(source, cache)
    identity = fingerprint(name, logical, inputs)
    found = find_verified(target.path, identity, cache)
    if found is not None:
        return found
    summary = build(target)
    cache.remember(target.path, journal_records(target))
    return publish(Artifact(name, identity, inputs, logical, (), summary), target.path, cache)


def _once_remote(
    name: str,
    source: Folder,
    target: Target,
    logical: Mapping[str, Any],
    build: Callable[[Target], Mapping[str, Any]],
) -> Artifact:
    """The same for an object store, whose files count as verified where their sizes are those recorded."""
    inputs = _inputs(source, None)
    identity = fingerprint(name, logical, inputs)
    found = _recorded(target)
    if found is not None and found.fingerprint == identity:
        sizes = {record.path: target.content(record.path).size for record in found.files if target.mark(record.path)}
        if sizes == {record.path: record.size for record in found.files}:
            return found
    summary = build(target)
    known = {record.path: record for record in journal_records(target)}
    records = tuple(
        known.get(path) or FileRecord(path, *target.digest(path)) for path in target.files() if path != ARTIFACT_FILE
    )
    artifact = Artifact(name, identity, inputs, logical, records, summary, software(), Path(str(target)))
    target.write(ARTIFACT_FILE, artifact_text(artifact).encode())
    return artifact


def _inputs(source: Folder, cache: DigestCache | None) -> dict[str, str]:
    """What tells the content of each of the source's files: SHA-256, or an object's ETag and size, hashed."""
    if isinstance(source, LocalFolder):
        paths = [path for path in sorted(source.path.iterdir()) if path.is_file() and not path.name.startswith(".")]
        digests = [sha256_of(path) for path in paths] if cache is None else cache.digests(paths)
        return {path.name: digest for path, digest in zip(paths, digests, strict=True)}
    return file_versions(source)


def _recorded(target: Target) -> Artifact | None:
    try:
        return parse_artifact(target.read_text(ARTIFACT_FILE), Path(str(target)))
    except (OSError, ValueError, TypeError, KeyError):
        return None
