"""Tokenize raw text into token files, one worker process per input file, restartable file by file."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from neox_core.artifact import DigestCache, sha256_of, write_atomically
from neox_core.config import RunConfig, TokenizerConfig
from neox_core.data.dataset import token_prefix
from neox_core.data.indexed import IndexedDataset, IndexedWriter, merge
from neox_core.data.ledger import run_ledger
from neox_core.data.text import SPLITS, documents, source_files
from neox_core.data.tokenizer import Tokenizer
from neox_core.errors import ConfigError, DataError
from neox_core.progress import Progress, silent

_log = logging.getLogger(__name__)
_PARTS = ".parts"
_MEGABYTE = 1e6


@dataclass(frozen=True)
class InputFile:
    """One unit of work: a file of text."""

    source: str
    split: str
    path: Path

    def part(self, folder: Path) -> Path:
        """Prefix of this file's token files until they are merged."""
        return folder / _PARTS / self.source / self.split / self.path.name


@dataclass(frozen=True)
class PartRecord:
    """What a part holds and what it was made from; written after its token files."""

    documents: int
    bytes: int
    tokens: int
    made_from: dict[str, str]


def input_digests(config: RunConfig, cache: DigestCache) -> dict[str, str]:
    """SHA-256 of every input file by its name in data.input, and of the tokenizer's model as "tokenizer.model".

    Raises:
        DataError: a source or file is missing, empty or of another kind; found before anything is hashed.
        ConfigError: the tokenizer's model is missing or does not fit the model.
    """
    paths = {file.path.relative_to(config.data.input).as_posix(): file.path for file in checked_inputs(config)}
    paths["tokenizer.model"] = config.tokenizer.model
    return dict(zip(paths, cache.digests(paths.values()), strict=True))


def checked_inputs(config: RunConfig) -> list[InputFile]:
    """Every file to tokenize, by source, split and name; train of all sources, the rest of those for evaluation.

    Raises:
        DataError, ConfigError: as `input_digests`.
    """
    if not config.data.input.is_dir():
        raise DataError(f"data.input {config.data.input} is not a folder: correct the path")
    vocab_size = Tokenizer(config.tokenizer).vocab_size
    if vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"tokenizer {config.tokenizer.model} has {vocab_size} pieces, more than model.vocab_size "
            f"{config.model.vocab_size}: use the base model's own tokenizer or correct model.vocab_size"
        )
    return [
        InputFile(source, split, path)
        for source in sorted(config.data.sources)
        for split in SPLITS
        if split == "train" or source in config.data.validation_sources
        for path in source_files(config.data, source, split)
    ]


def prepare_data(config: RunConfig, folder: Path, progress: Progress = silent) -> dict[str, Any]:
    """Tokenize all sources into `<folder>/<source>/<split>.bin/.idx` and return the ledger (see `run_ledger`).

    Parts that an earlier, killed call left under `<folder>/.parts/` are used if they are of the same text, tokenizer
    and settings. The files are the same, bit for bit, for any number of workers.

    Raises:
        DataError: an input is missing or bad, or a source would be repeated too often; finished parts are kept.
        ConfigError: the tokenizer's model is missing or does not fit the model.
    """
    files = checked_inputs(config)
    records = _tokenize_all(files, config, folder, progress)
    counts: dict[str, dict[str, dict[str, int]]] = {}
    for file, record in zip(files, records, strict=True):
        count = counts.setdefault(file.source, {}).setdefault(file.split, {"documents": 0, "bytes": 0, "tokens": 0})
        for unit in count:
            count[unit] += getattr(record, unit)
    ledger = run_ledger(counts, config)
    for source, splits in counts.items():
        for split in splits:
            parts = [file.part(folder) for file in files if (file.source, file.split) == (source, split)]
            merge(parts, token_prefix(folder, source, split))
    shutil.rmtree(folder / _PARTS)
    for leftover in folder.glob("*/.*.tmp"):  # of merges that were killed
        leftover.unlink()
    return ledger


def tokenize_file(file: InputFile, tokenizer: TokenizerConfig, folder: Path) -> PartRecord:
    """Make one file's part, or find it made; runs in a worker.

    Raises:
        DataError: the file has a bad record or is damaged.
    """
    part = file.part(folder)
    record_path = part.with_name(f"{part.name}.json")
    made_from = {
        "text": sha256_of(file.path),
        "tokenizer": sha256_of(tokenizer.model),
        "end_of_document": tokenizer.end_of_document,
        "begin_of_document": str(tokenizer.begin_of_document),
    }
    if found := _finished_part(part, record_path, made_from):
        return found
    model = Tokenizer(tokenizer)
    count = text_bytes = tokens = 0
    with IndexedWriter(part, model.dtype) as writer:
        for document in documents(file.path):
            ids = model.encode_document(document.text)
            writer.add_document(ids)
            count, text_bytes, tokens = count + 1, text_bytes + document.bytes, tokens + len(ids)
    record = PartRecord(count, text_bytes, tokens, made_from)
    write_atomically(record_path, json.dumps(asdict(record)))
    return record


def _finished_part(part: Path, record_path: Path, made_from: dict[str, str]) -> PartRecord | None:
    try:
        record = PartRecord(**json.loads(record_path.read_text()))
        dataset = IndexedDataset(part)
    except (OSError, ValueError, TypeError, DataError):
        return None
    whole = (len(dataset), len(dataset.tokens)) == (record.documents, record.tokens)
    return record if whole and record.made_from == made_from else None


def _tokenize_all(files: Sequence[InputFile], config: RunConfig, folder: Path, progress: Progress) -> list[PartRecord]:
    """Records of all files, in their order."""
    workers = min(config.data.workers or len(os.sched_getaffinity(0)), len(files))
    # spawn: a fork of a process with threads, which Prefect's is, may hang.
    context = multiprocessing.get_context("spawn")
    largest_first = sorted(files, key=lambda file: -file.path.stat().st_size)
    with ProcessPoolExecutor(workers, context, initializer=_end_with_parent) as pool:
        futures = {pool.submit(tokenize_file, file, config.tokenizer, folder): file for file in largest_first}
        try:
            records = dict(_followed(futures, progress))
        except BrokenProcessPool:
            raise DataError(
                f"a tokenizer process was killed, perhaps for want of memory: lower data.workers ({workers}) and run "
                "again; finished files are kept"
            ) from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    return [records[file] for file in files]


def _followed(
    futures: dict[Future[PartRecord], InputFile], progress: Progress
) -> Iterator[tuple[InputFile, PartRecord]]:
    """Results as they come, with progress."""
    started, text_bytes, read_bytes = time.monotonic(), 0, 0
    total_bytes = sum(file.path.stat().st_size for file in futures.values())
    progress(0.0, f"0 of {len(futures)} files")
    for done, future in enumerate(as_completed(futures), start=1):
        file, record = futures[future], future.result()
        text_bytes, read_bytes = text_bytes + record.bytes, read_bytes + file.path.stat().st_size
        rate = text_bytes / _MEGABYTE / max(time.monotonic() - started, 1e-3)
        progress(read_bytes / total_bytes, f"{done} of {len(futures)} files, {rate:.1f} MB/s")
        _log.info("%s: %d documents, %d tokens", file.path, record.documents, record.tokens)
        yield file, record


def _end_with_parent() -> None:
    """End this worker when its parent is killed; it would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "runs in a worker only"

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
