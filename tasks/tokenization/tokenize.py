"""prepare-data's work: raw text into token files, restartable file by file, in processes here or in SLURM jobs."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from neox_core.artifact import DigestCache
from neox_core.config import RunConfig
from neox_core.data.dataset import token_prefix
from neox_core.data.ledger import LEFT_OUT
from neox_core.data.tokenization.assemble import (
    SplitPlan,
    check_rejected,
    check_unchanged,
    merge_split,
    plan_splits,
)
from neox_core.data.tokenization.filters.dropped import MadePart, ValidationTexts, find_in_validation
from neox_core.data.tokenization.filters.findings import check_damaged, write_in_validation
from neox_core.data.tokenization.filters.findings import write_overlap as write_overlaps
from neox_core.data.tokenization.filters.findings import write_rejected as write_rejections
from neox_core.data.tokenization.filters.overlap import OverlapWords, load_items, set_names
from neox_core.data.tokenization.part_files import PartPaths
from neox_core.data.tokenization.part_settings import PartSettings
from neox_core.data.tokenization.readers import InputFile, source_files, splits_of
from neox_core.data.tokenization.readers.inputs import content_digest
from neox_core.data.tokenization.tokenizer import Tokenizer
from neox_core.errors import ConfigError, DataError
from neox_core.progress import Progress, silent
from tasks.tokenization.array import made_in_jobs
from tasks.tokenization.pool import made_in_processes
from tasks.tokenization.progress import PartsProgress

logger = logging.getLogger(__name__)

_UNITS = ("documents_in", "documents", *LEFT_OUT)


def input_digests(config: RunConfig, cache: DigestCache) -> dict[str, str]:
    """What identifies the content of every input file, by <source>/<split>/<name>, of the evaluation sets and, as
    "tokenizer.model", of the tokenizer's model: SHA-256, or an S3 object's ETag and size, hashed.

    Raises:
        DataError: a source or file is missing, empty or of another kind; found before anything is hashed.
        ConfigError: the tokenizer's model is missing or does not fit the model.
    """
    files = checked_inputs(config)
    remote = {file.logical_name: content_digest(file) for file in files if file.location.startswith("s3://")}
    paths = {file.logical_name: Path(file.location) for file in files if file.logical_name not in remote}
    sets = config.data.evaluation_sets
    paths |= {f"evaluation_sets/{i}/{name}": sets[i] for i, name in enumerate(set_names(sets))}
    paths["tokenizer.model"] = config.tokenizer.file
    return remote | dict(zip(paths, cache.digests(paths.values()), strict=True))


def checked_inputs(config: RunConfig) -> list[InputFile]:
    """Every file to tokenize, by source, split and name; train of all sources, the rest of those for evaluation.

    Raises:
        DataError, ConfigError: as `input_digests`.
        StorageError: the object store cannot be listed.
    """
    data = config.data
    in_folders = any("train" not in source.files for source in data.sources.values())
    if in_folders and not data.input.startswith("s3://") and not Path(data.input).is_dir():
        raise DataError(f"data.input {data.input} is not a folder: correct the path")
    _checked_tokenizer(config)
    load_items(data.evaluation_sets, OverlapWords(data.overlap_words, data.overlap_min_words))
    return [
        file
        for source in sorted(data.sources)
        for split in splits_of(data, source)
        for file in source_files(data, config.storage, source, split)
    ]


def _checked_tokenizer(config: RunConfig) -> Tokenizer:
    tokenizer = Tokenizer(config.tokenizer.model_copy(update={"engine": "sentencepiece"}))
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"tokenizer {config.tokenizer.file} has {tokenizer.vocab_size} pieces, more than model.vocab_size "
            f"{config.model.vocab_size}: use the base model's own tokenizer or correct model.vocab_size"
        )
    return tokenizer


def prepare_data(config: RunConfig, folder: Path, parts_in: Path, progress: Progress = silent) -> dict[str, Any]:
    """Tokenize all sources into `<folder>/<source>/<split>.bin/.idx`.

    Parts that an earlier call left under `<parts_in>/.parts/` are used if they are of the same text, tokenizer and
    settings, whatever else was configured; nobody else may make parts there meanwhile. The files are the same, bit for
    bit, for any number of workers. Records that hold no usable text are listed in `<folder>/rejected.jsonl`, overlaps
    with the evaluation sets in `<folder>/overlap.json`.

    Args:
        parts_in: folder of the parts; the caller removes them when the files are safe.

    Returns:
        "sources": per source and split documents, bytes (UTF-8 of the text), tokens, documents_in and each of LEFT_OUT;
        "accounting", their sums, and the stored bytes of "damaged_files" (left out) of all; "empty_files"; "encoder";
        "in_validation", training documents that (nearly) equal a validation document; with evaluation sets, "overlap".

    Raises:
        DataError: an input is missing or damaged, or too many of its records are bad; finished parts are kept. Or
            parts were replaced meanwhile.
        ConfigError: the tokenizer's model is missing or does not fit the model.
        LaunchError, StorageError: a job failed, or the object store did.
    """
    inputs = checked_inputs(config)
    if lost := _checked_tokenizer(config).lost:
        logger.warning("the tokenizer has no ids for %s: they are left out of texts, as everywhere", ascii(lost))
    parts = _make_parts(inputs, config, parts_in, progress)
    write_rejections(parts, folder)
    check_damaged(parts, config.data)
    in_validation = find_in_validation(parts, config.data)
    plans = _plan(parts, config, in_validation, folder)
    counts: dict[str, dict[str, Mapping[str, int]]] = {}
    for (source, split), plan in plans.items():
        counts.setdefault(source, {})[split] = plan.counts
    overlap = {"overlap": write_overlaps(parts, config.data, folder)} if config.data.evaluation_sets else {}
    for done, ((source, split), plan) in enumerate(plans.items()):
        progress(0.95 + 0.05 * done / len(plans), f"merging {source}/{split}")
        merge_split(plan, token_prefix(folder, source, split), _workers(config))
    check_unchanged(parts)
    for leftover in folder.glob("*/.*.tmp"):  # of merges that were killed
        leftover.unlink()
    progress(1.0, f"{len(parts)} files done")
    repeated = write_in_validation(parts, in_validation, config.data, folder)
    return {"sources": counts, **overlap, "in_validation": repeated, **_findings(parts, plans)}


def _make_parts(files: Sequence[InputFile], config: RunConfig, folder: Path, progress: Progress) -> list[MadePart]:
    """Parts of all files, in their order."""
    settings = PartSettings.of(config)
    parts_progress = PartsProgress(files, folder, lambda share, text: progress(0.95 * share, text))
    if config.data.slurm:
        made = made_in_jobs(files, settings, folder, config.data.slurm)
    else:
        made = made_in_processes(files, settings, folder, _workers(config), parts_progress.update)
    records = dict(parts_progress.follow(made))
    return [MadePart(file, records[file], PartPaths.of(file, folder)) for file in files]


def _plan(
    parts: Sequence[MadePart], config: RunConfig, in_validation: Sequence[ValidationTexts], folder: Path
) -> dict[tuple[str, str], SplitPlan]:
    plans = plan_splits(parts, config.data, in_validation)
    for source in config.data.sources:
        of_source = [plan for key, plan in plans.items() if key[0] == source]
        check_rejected(of_source, source, config.data.max_rejected, folder)
    return plans


def _findings(parts: Sequence[MadePart], plans: Mapping[tuple[str, str], SplitPlan]) -> dict[str, Any]:
    return {
        "accounting": {
            **{unit: sum(plan.counts[unit] for plan in plans.values()) for unit in _UNITS},
            "stored_bytes": sum(part.file.size for part in parts),
            "damaged_bytes": sum(part.file.size for part in parts if part.record.damaged),
        },
        "encoder": {
            "engine": ", ".join(sorted({part.record.engine for part in parts})),
            "documents_verified": sum(part.record.verified for part in parts),
        },
        "damaged_files": [part.file.logical_name for part in parts if part.record.damaged],
        "empty_files": [part.file.logical_name for part in parts if _is_empty(part)],
    }


def _is_empty(part: MadePart) -> bool:
    return not (part.record.documents or part.record.rejected or part.record.empty or part.record.damaged)


def _workers(config: RunConfig) -> int:
    return config.data.workers or len(os.sched_getaffinity(0))
