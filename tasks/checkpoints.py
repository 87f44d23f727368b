"""Conversions between folders that belong to no run: `llemma convert` and `llemma export`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from neox_core.artifact import Artifact, DigestCache, find_verified, fingerprint, publish, sha256_of
from neox_core.config import ModelConfig, ParallelConfig
from neox_core.progress import Progress

ExportForm = Literal["huggingface", "meta"]
_DIGESTS = ".digests.json"


def convert_folder(
    source: Path, target: Path, parallel: ParallelConfig, vocab_multiple: int, progress: Progress
) -> Artifact:
    """Meta's or Hugging Face's weights to NeoX shards, proven; artifact.json comes last.

    Args:
        vocab_multiple: the vocabulary is padded to a multiple of it; exports cut the padding off again.

    Raises:
        CheckpointError, ConfigError, StorageError: see `convert` and `prove_conversion`.
    """
    from neox_core.checkpoint.convert import convert, open_source
    from neox_core.checkpoint.proof import prove_conversion

    base = open_source(source).model
    model = _padded(base, vocab_multiple)
    logical = {"model": model.model_dump(mode="json"), "parallel": parallel.model_dump(mode="json")}

    def build() -> Mapping[str, Any]:
        return convert(
            source,
            target,
            model,
            parallel,
            progress,
            base_vocab_size=base.vocab_size,
            prove=lambda checkpoint, shards: prove_conversion(checkpoint.folder, shards, model, progress),
        )

    return _once("convert", source, target, logical, build)


def export_folder(
    source: Path,
    target: Path,
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
    from neox_core.checkpoint.export import export_huggingface, export_meta, prove_export
    from neox_core.checkpoint.inspect import recorded_model
    from neox_core.checkpoint.neox import NeoxCheckpoint

    known = model or recorded_model(source)
    checkpoint = NeoxCheckpoint(source)
    logical: dict[str, Any] = {"model": known.model_dump(mode="json"), "form": form, "sequence_length": sequence_length}
    logical |= {"shards": shards, "tokenizer": None if tokenizer is None else sha256_of(tokenizer)}

    def build() -> Mapping[str, Any]:
        if form == "meta":
            sizes = export_meta(source, target, known, shards, progress)
        else:
            sizes = export_huggingface(source, target, known, tokenizer, sequence_length, progress)
        return sizes | prove_export(checkpoint, target, known, progress=progress)

    return _once("export", checkpoint.folder, target, logical, build)


def _padded(base: ModelConfig, multiple: int) -> ModelConfig:
    """The model with its vocabulary padded to a multiple."""
    size = -(-base.vocab_size // multiple) * multiple
    if size == base.vocab_size:
        return base
    return base.model_copy(update={"vocab_size": size, "unpadded_vocab_size": base.vocab_size})


def _once(
    name: str, source: Path, target: Path, logical: Mapping[str, Any], build: Callable[[], Mapping[str, Any]]
) -> Artifact:
    """The artifact in `target`, built unless it is there and verifies."""
    cache = DigestCache(target / _DIGESTS)
    paths = sorted(path for path in source.iterdir() if path.is_file() and not path.name.startswith("."))
    inputs = {path.name: digest for path, digest in zip(paths, cache.digests(paths), strict=True)}
    identity = fingerprint(name, logical, inputs)
    found = find_verified(target, identity, cache)
    if found is not None:
        return found
    summary = build()
    return publish(Artifact(name, identity, inputs, logical, (), summary), target, cache)
