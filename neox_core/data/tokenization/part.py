"""One input file's tokens: a part. Made atomically, and found again if it is of the same text and settings."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, fields
from functools import lru_cache
from typing import TYPE_CHECKING

from neox_core.data.tokenization.filters.overlap import EvaluationItems, load_items
from neox_core.data.tokenization.part_files import PARTS, PartPaths, PartWriter
from neox_core.data.tokenization.part_settings import Done, PartRecord, PartSettings, TokenizerSettings
from neox_core.data.tokenization.readers import DamagedFileError, InputFile, WrongColumnError, open_input, read_records
from neox_core.data.tokenization.readers.inputs import content_digest
from neox_core.data.tokenization.tokenizer import Tokenizer
from neox_core.errors import DataError
from neox_core.storage.atomic import write_atomically

if TYPE_CHECKING:
    from pathlib import Path


def make_part(
    file: InputFile, settings: PartSettings, folder: Path, on_progress: Callable[[Done], None] = lambda done: None
) -> PartRecord:
    """Make one file's part, or find it made. Memory is bounded whatever the file's size.

    Args:
        on_progress: called now and then with what is done of the file, and with all of it at last; never if the part is
            found.

    Raises:
        DataError: the file cannot be read, or an id is not SentencePiece's. Of a damaged file the part is empty, and
            its record says why: it is for the caller, who knows of all files, to refuse it.
        ConfigError, StorageError: the tokenizer, an evaluation set or an object cannot be read.
    """
    try:
        return _found_or_made(file, settings, folder, on_progress)
    except OSError as error:
        raise DataError(
            f"{file.location} cannot be made a part of: {error}: look at the disks and run again"
        ) from error


def _found_or_made(
    file: InputFile, settings: PartSettings, folder: Path, on_progress: Callable[[Done], None]
) -> PartRecord:
    paths = PartPaths.of(file, folder)
    made_from = {"text": content_digest(file), **settings.logical()}
    found = find_part(paths, made_from)
    if found and (settings.skip_damaged_files or not found.damaged) and _is_of_engine(found, settings):
        return found
    tokenizer, damaged = _tokenizer(settings.tokenizer, made_from["tokenizer"]), ""
    try:
        writer = _written(file, settings, paths, tokenizer, folder / PARTS, on_progress)
    except WrongColumnError as error:
        raise WrongColumnError(file.location, error.reason) from None
    except DamagedFileError as error:
        damaged = error.reason
        with PartWriter(file, paths, tokenizer) as writer:
            writer.leave_out(damaged)
    record = PartRecord(
        documents=len(writer),
        bytes=writer.bytes,
        tokens=writer.tokens,
        rejected=writer.rejected,
        empty=writer.empty,
        damaged=damaged,
        engine=tokenizer.engine,
        verified=writer.verified,
        sha256=paths.digests(),
        made_from=made_from,
    )
    write_atomically(paths.record, json.dumps(asdict(record)))
    on_progress(Done(file.size, record.bytes, record.tokens))
    return record


def _is_of_engine(found: PartRecord, settings: PartSettings) -> bool:
    """Engines give the same ids; who demands SentencePiece's has seen that they did not."""
    return settings.tokenizer.engine == "auto" or found.engine.startswith(settings.tokenizer.engine)


def _written(
    file: InputFile,
    settings: PartSettings,
    paths: PartPaths,
    tokenizer: Tokenizer,
    scratch: Path,
    on_progress: Callable[[Done], None],
) -> PartWriter:
    items = _items(settings) if file.split == "train" else None
    with (
        open_input(file, settings.storage, scratch) as path,
        PartWriter(file, paths, tokenizer, items, settings.signatures) as writer,
    ):
        for record in read_records(
            path,
            settings.text_key,
            lambda read: on_progress(Done(read, writer.bytes, writer.tokens)),
            settings.formats,
        ):
            writer.add(record)
    return writer


def load_before_fork(settings: PartSettings) -> None:
    """Load what every part needs, so that the forks of this process have it.

    Raises:
        ConfigError, DataError: as `make_part`.
    """
    _tokenizer(settings.tokenizer, settings.logical()["tokenizer"])
    _items(settings)


def _items(settings: PartSettings) -> EvaluationItems | None:
    return load_items(settings.evaluation_sets, settings.overlap) if settings.evaluation_sets else None


@lru_cache(maxsize=1)
def _tokenizer(settings: TokenizerSettings, model_sha256: str) -> Tokenizer:
    """One per process; the digest is there so that a changed file is read again."""
    return Tokenizer(settings)


def find_part(paths: PartPaths, made_from: dict[str, str]) -> PartRecord | None:
    """The record of a part that is whole and of the same text and settings; else None."""
    record = find_record(paths)
    if record is None or record.made_from != made_from:
        return None
    try:
        return record if record.sha256 == paths.digests() else None
    except OSError:
        return None


def find_record(paths: PartPaths) -> PartRecord | None:
    """The record of a part, whole or not; None if there is none or it is damaged."""
    try:
        content = json.loads(paths.record.read_text())
        return PartRecord(**content) if set(content) == {field.name for field in fields(PartRecord)} else None
    except (OSError, ValueError, TypeError):
        return None
