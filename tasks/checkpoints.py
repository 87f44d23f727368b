"""Conversions between folders that belong to no run: `llemma convert` and `llemma export`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
    software,
)
from neox_core.checkpoint.conversion.replacement import check_target, recorded_artifact
from neox_core.checkpoint.formats.outputs import journal_records
from neox_core.checkpoint.formats.special_ids import SpecialIds, from_json, special_ids_of
from neox_core.config import ModelConfig, ParallelConfig, TokenizerConfig
from neox_core.data.tokenization.tokenizer_file import companions
from neox_core.errors import CheckpointError, ConfigError
from neox_core.progress import Progress
from neox_core.storage.digest import sha256_of
from neox_core.storage.folders import Folder, LocalFolder, Location, file_versions, open_folder
from neox_core.storage.targets import LocalTarget, Target, open_target
from tasks.identity.once import LocalPlace, build_unless_verified

ExportForm = Literal["huggingface", "meta"]
_DIGESTS = ".digests.json"


def convert_folder(
    source: str,
    target: str,
    parallel: ParallelConfig,
    vocab_multiple: int,
    progress: Progress,
    overwrite: bool = False,
) -> Artifact:
    """Meta's or Hugging Face's weights to NeoX shards, proven; artifact.json comes last.

    Args:
        vocab_multiple: the vocabulary is padded to a multiple of it; exports cut the padding off again.
        overwrite: replace a model in the target that is not this command's own earlier output.

    Raises:
        CheckpointError, ConfigError, StorageError: see `convert` and `prove_conversion`.
    """
    from neox_core.checkpoint.conversion.convert import convert, open_source
    from neox_core.checkpoint.conversion.proof import prove_conversion

    output = _open_target(target, "convert", overwrite)
    checkpoint = open_source(source)
    base = checkpoint.model
    model = _padded(base, vocab_multiple)
    logical = {"model": model.model_dump(mode="json"), "parallel": parallel.model_dump(mode="json")}

    def build(folder: Target) -> Mapping[str, Any]:
        check_target(folder, "convert", overwrite)
        return convert(
            checkpoint.folder,
            folder,
            model,
            parallel,
            progress,
            base_vocab_size=base.vocab_size,
            prove=lambda checkpoint, shards: prove_conversion(checkpoint.folder, shards, model, progress),
        )

    return _once("convert", checkpoint.folder, checkpoint.files.names, output, logical, build)


def export_folder(
    source: str,
    target: str,
    form: ExportForm,
    model: ModelConfig | None,
    shards: int,
    tokenizer: Path | None,
    sequence_length: int,
    progress: Progress,
    overwrite: bool = False,
    base: Location | None = None,
) -> Artifact:
    """A NeoX or training checkpoint to Hugging Face's or Meta's format, proven; artifact.json comes last.

    Args:
        model: its architecture; None: as the source's artifact.json records it.
        shards: number of files in Meta's format.
        tokenizer: for a Hugging Face folder, a tokenizer's file of any kind that is read, or the folder of one.
        overwrite: as for `convert_folder`.
        base: the base model, whose special ids and generation settings the export gets where the source has no
            artifact.json that records them.

    Raises:
        CheckpointError, ConfigError, StorageError: see `export_huggingface`, `export_meta` and `prove_export`.
    """
    from neox_core.checkpoint.conversion.export import export_huggingface, export_meta, prove_export
    from neox_core.checkpoint.conversion.inspect import recorded_model
    from neox_core.checkpoint.formats.neox import NeoxCheckpoint

    output = _open_target(target, "export", overwrite)
    tokenizer = None if tokenizer is None else _tokenizer_file(tokenizer)
    opened = open_folder(source)
    known = model or recorded_model(opened)
    checkpoint = NeoxCheckpoint(opened)
    logical: dict[str, Any] = {"model": known.model_dump(mode="json"), "form": form, "sequence_length": sequence_length}
    logical |= {"shards": shards, "tokenizer": None if tokenizer is None else sha256_of(tokenizer)}
    if tokenizer is not None and (others := companions(tokenizer)):
        logical["tokenizer_companions"] = {path.name: sha256_of(path) for path in others}
    special = _special_ids(opened, base)
    identity = replace(special, config=None)  # with which the export is compared, and does not change
    logical |= {"special_ids": identity.as_json()} if special.ids or special.generation else {}

    def prove(folder: Location) -> Mapping[str, Any]:
        return prove_export(checkpoint, folder, known, progress=progress)

    def build(folder: Target) -> Mapping[str, Any]:
        check_target(folder, "export", overwrite)
        if form == "meta":
            return export_meta(opened, folder, known, shards, progress, prove)
        return export_huggingface(
            opened, folder, known, tokenizer, sequence_length, progress, special=special, prove=prove
        )

    return _once("export", checkpoint.folder, checkpoint.files, output, logical, build)


def _tokenizer_file(tokenizer: Path) -> Path:
    """The tokenizer's file, of a folder as a run takes it."""
    file = TokenizerConfig(model=tokenizer).file
    if file.is_file():
        return file
    problem = "holds neither tokenizer.model nor tokenizer.json" if tokenizer.is_dir() else "does not exist"
    raise CheckpointError(f"tokenizer {tokenizer} {problem}: give one of these files, or the folder of one")


def _open_target(location: str, command: str, overwrite: bool) -> Target:
    """The place to write to, once nothing stands in the way; nothing is written yet."""
    if not location.strip():
        raise ConfigError("--to is empty: name a folder or s3://bucket/prefix to write to")
    target = open_target(location)
    found = recorded_artifact(target)
    if found is None or found.name != command:  # else it may be this very result, with a README next to it by now
        check_target(target, command, overwrite)
    return target


def _special_ids(source: Folder, base: Location | None) -> SpecialIds:
    """The base's special ids: as the conversion's artifact.json records them, or from its folder if it is there."""
    artifact = recorded_artifact(source)
    if artifact is not None:
        return from_json(artifact.summary.get("special_ids") or {})
    folder = None if base is None else open_folder(base)
    return special_ids_of(folder) if folder is not None and folder.exists() else SpecialIds()


def _padded(base: ModelConfig, multiple: int) -> ModelConfig:
    """The model with its vocabulary padded to a multiple."""
    size = -(-base.vocab_size // multiple) * multiple
    if size == base.vocab_size:
        return base
    return base.model_copy(update={"vocab_size": size, "unpadded_vocab_size": base.vocab_size})


def _once(
    name: str,
    source: Folder,
    files: Sequence[str],
    target: Target,
    logical: Mapping[str, Any],
    build: Callable[[Target], Mapping[str, Any]],
) -> Artifact:
    """The artifact in `target`, built unless it is there and verifies."""
    local = LocalPlace(target.path, DigestCache(target.path / _DIGESTS)) if isinstance(target, LocalTarget) else None
    inputs = _inputs(source, files, local.cache if local else None)
    draft = Artifact(name, fingerprint(name, logical, inputs), inputs, logical, (), {})

    def build_and_remember() -> Mapping[str, Any]:
        summary = build(target)
        if local:
            local.cache.remember(local.folder, journal_records(target))
        return summary

    return build_unless_verified(draft, local or RemotePlace(target), build_and_remember)[0]


def _inputs(source: Folder, files: Sequence[str], cache: DigestCache | None) -> dict[str, str]:
    """What identifies the content of each of the model's files: SHA-256, or an object's ETag and size, hashed."""
    if isinstance(source, LocalFolder):
        paths = [source.path / name for name in sorted(files)]
        digests = [sha256_of(path) for path in paths] if cache is None else cache.digests(paths)
        return {path.name: digest for path, digest in zip(paths, digests, strict=True)}
    return file_versions(source, files)


@dataclass(frozen=True)
class RemotePlace:
    """A prefix of an object store, whose files verify by their sizes."""

    target: Target

    def find(self, fingerprint: str) -> Artifact | None:
        """As `ArtifactPlace.find`."""
        found = recorded_artifact(self.target)
        if found is None:
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
