"""Weights in Meta's or Hugging Face's format to NeoX's shards for a tensor- and pipeline-parallel layout."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from neox_core.artifact import FileRecord
from neox_core.checkpoint.conversion.reference import open_reference
from neox_core.checkpoint.conversion.replacement import replacing
from neox_core.checkpoint.conversion.vocabulary import NewTokens, new_rows
from neox_core.checkpoint.formats.huggingface import HuggingFaceCheckpoint
from neox_core.checkpoint.formats.meta import MetaCheckpoint
from neox_core.checkpoint.formats.model_files import model_files
from neox_core.checkpoint.formats.model_weights import ModelWeights
from neox_core.checkpoint.formats.neox import CONVERTED_TAG, LATEST_FILE, NeoxCheckpoint, is_neox_file, neox_files
from neox_core.checkpoint.formats.outputs import finished_files, write_files
from neox_core.checkpoint.formats.special_ids import special_ids_of
from neox_core.checkpoint.formats.tensor_map import check_divides
from neox_core.config import ModelConfig, ParallelConfig
from neox_core.errors import ConfigError
from neox_core.progress import Progress, silent
from neox_core.storage.folders import Location, open_folder
from neox_core.storage.targets import open_target

SourceCheckpoint = MetaCheckpoint | HuggingFaceCheckpoint
Proof = Callable[[SourceCheckpoint, NeoxCheckpoint], Mapping[str, Any]]
"""Compares the shards with the source and raises CheckpointError if they are not the same model."""


def open_source(location: Location) -> SourceCheckpoint:
    """Open a folder in Meta's or in Hugging Face's format, whichever it is.

    Raises:
        CheckpointError: it is neither, or is damaged or inconsistent.
    """
    folder = open_folder(location)
    return MetaCheckpoint(folder) if model_files(folder).is_meta else HuggingFaceCheckpoint(folder)


def convert(
    source: Location,
    target: Location,
    model: ModelConfig,
    parallel: ParallelConfig,
    progress: Progress = silent,
    base_rope_theta: float | None = None,
    base_vocab_size: int | None = None,
    new_tokens: NewTokens = "mean",
    prove: Proof | None = None,
) -> dict[str, Any]:
    """Convert to NeoX's layout in `target`, bf16; values that are bf16 in the source are kept bit for bit.

    An interrupted conversion continues with the next file. Memory: some 60 MiB per file that is being written.

    Args:
        source: folder in Meta's format (params.json, consolidated.NN.pth) or Hugging Face's (config.json, safetensors).
        target: folder for latest and global_step0; another conversion in it is replaced after the proof.
        model: architecture of the run.
        parallel: ranks to cut for; pipeline > 1 gives one file per layer.
        progress: called with how far it is: bytes, bytes/s, time left.
        base_rope_theta: RoPE base of the source, where the run changes it on purpose (Llemma 7B: 1e6 to 1e4).
        base_vocab_size: vocabulary of the source, where the run adds tokens or padding on purpose.
        new_tokens: how their rows are made.
        prove: called before `latest` is written.

    Returns:
        A summary: bytes, seconds, and what `prove` found.

    Raises:
        CheckpointError: the source is missing, damaged or inconsistent, the proof failed, or another conversion is
            writing to `target`.
        ConfigError: the source is another architecture than `model`, or the layout does not divide it.
        StorageError: the disk is too small, or the object store cannot be used.
    """
    checkpoint = open_source(source)
    check_architecture(checkpoint, model, base_rope_theta, base_vocab_size)
    check_divides(model, parallel.tensor, "parallel.tensor")
    checkpoint.check_values()
    special = special_ids_of(checkpoint.folder)
    if prove is not None:
        open_reference(checkpoint.folder, 1, torch.bfloat16)  # which may refuse config.json
    started = time.monotonic()
    weights = checkpoint.weights
    files = neox_files(weights, model, parallel, torch.bfloat16, new_rows(new_tokens, weights))
    output, identity = open_target(target), _identity(checkpoint, model, parallel, new_tokens)
    with output.locked(), replacing(output, identity, LATEST_FILE, is_neox_file) as folder:
        finished = finished_files(folder, identity, files)
        if len(finished) < len(files):
            folder.remove(LATEST_FILE)
        records = write_files(folder, identity, files, progress, finished, [LATEST_FILE])
        summary = sizes(records, finished, time.monotonic() - started)
        summary |= _rounding(weights) | {"special_ids": special.as_json()}
        if prove is not None:
            progress(0.999, "comparing layers with transformers")
            summary |= prove(checkpoint, NeoxCheckpoint(folder.sub(CONVERTED_TAG)))
        folder.write(LATEST_FILE, CONVERTED_TAG.encode())
    progress(1.0, f"{len(records)} files written")
    return summary


def _rounding(weights: ModelWeights) -> dict[str, str]:
    """Which types were rounded to bf16; where files mix types, in how many tensors."""
    rounded = {str(dtype).removeprefix("torch."): count for dtype, count in weights.dtypes.items()}
    total = sum(rounded.values())
    rounded.pop("bfloat16", None)
    shown = [name if count == total else f"{name} in {count} of {total} tensors" for name, count in rounded.items()]
    return {"rounded_from": ", ".join(sorted(shown))} if shown else {}


def sizes(records: list[FileRecord], finished: Mapping[str, FileRecord], seconds: float) -> dict[str, Any]:
    """The part of a summary that is about files; those that were finished before do not count in the rate."""
    size = sum(record.size for record in records)
    written = size - sum(record.size for record in finished.values())
    rate = {"bytes_per_second": round(written / max(seconds, 1e-3))} if written else {}
    return {"files": len(records), "bytes": size, "write_seconds": round(seconds, 2), **rate}


def base_architecture(model: ModelConfig, rope_theta: float | None, vocab_size: int | None) -> ModelConfig:
    """The base of a run's model; its RoPE base and its vocabulary are given where the run changes them on purpose."""
    return model.model_copy(
        update={
            "rope_theta": rope_theta or model.rope_theta,
            "vocab_size": vocab_size or model.num_tokens,
            "unpadded_vocab_size": None,
        }
    )


def check_architecture(
    checkpoint: SourceCheckpoint,
    model: ModelConfig,
    base_rope_theta: float | None = None,
    base_vocab_size: int | None = None,
) -> None:
    """Compare the source's architecture with the run's, field by field.

    Raises:
        ConfigError: naming every field that differs, with both values.
    """
    expected = base_architecture(model, base_rope_theta, base_vocab_size)
    found = checkpoint.model
    differences = [
        f"{name} {getattr(expected, name)} (source: {getattr(found, name)})"
        for name in ModelConfig.model_fields
        if getattr(expected, name) != getattr(found, name)
    ]
    if differences:
        raise ConfigError(f"model differs from the base model in {checkpoint.folder}: {'; '.join(differences)}")
    if found.vocab_size > model.num_tokens:
        raise ConfigError(f"the base has {found.vocab_size} tokens, more than the model's {model.num_tokens}")


def _identity(checkpoint: SourceCheckpoint, model: ModelConfig, parallel: ParallelConfig, new_tokens: NewTokens) -> str:
    """What a half-finished attempt must have been about to be continued."""
    contents = {place.stored.content for places in checkpoint.weights.places.values() for place in places}
    logical = {
        "source": sorted([content.name, content.version] for content in contents),
        "model": model.model_dump(mode="json"),
        "parallel": parallel.model_dump(mode="json"),
        "new_tokens": new_tokens,
    }
    return hashlib.sha256(json.dumps(logical, sort_keys=True).encode()).hexdigest()
