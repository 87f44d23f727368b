"""prepare-data: text to token datasets and the ledger."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from neox_core.config import RunConfig
from neox_core.data.ledger import run_ledger
from neox_core.data.tokenization.part_files import PARTS
from neox_core.data.tokenization.tokenizer_file import TOKENIZER_MODEL, companions, tokenizer_in
from neox_core.errors import DataError
from neox_core.progress import Progress
from neox_core.storage.claims import claim
from neox_core.storage.digest import sha256_of
from tasks.identity.current import note_current, outlived
from tasks.identity.specs import PREPARE_DATA, prepare_spec
from tasks.identity.stage import StageResult, run_stage
from tasks.tokenization.tokenize import prepare_data

PARTS_CLAIM = "prepare-data-parts"
"""Of the parts in a workdir, for tasks.identity.stage.claim."""
_GIVEN_UP = f"{PARTS}-done-"


def prepare(config: RunConfig, progress: Progress) -> StageResult:
    """Tokenize every source, or find it done. The artifact's summary holds the counts per source, what was
    left out and why, and which engine encoded.

    Finished parts lie in `<workdir>/.parts/`, whatever the stage's folder, until the artifact is there: a run with a
    correction in its configuration or its files makes only the parts that the correction changes. Runs in one workdir
    take turns. Where the text, an evaluation set or the tokenizer is gone, what was made of it last stays current.

    Raises:
        DataError: an input is missing or bad, or the run would repeat a source too often; in the latter case the
            artifact is there, since the mixture may change without a new tokenization.
    """
    result = outlived(config, PREPARE_DATA) or _prepare(config, progress)
    ledger(config, result)
    return result


def _prepare(config: RunConfig, progress: Progress) -> StageResult:
    with ExitStack() as until_published:

        def build(folder: Path) -> Mapping[str, Any]:
            parts = claim(config.workdir, PARTS_CLAIM, "the parts of this workdir", progress)
            until_published.enter_context(parts)
            summary = prepare_data(config, folder, config.workdir, progress)
            _copy_tokenizer(config.tokenizer.file, folder, spec.inputs[TOKENIZER_MODEL])
            return summary

        spec = prepare_spec(config)
        result = run_stage(spec, build, progress, still_valid=lambda artifact: tokenizer_in(artifact.folder).is_file())
        if not result.skipped:
            _give_up_parts(config.workdir)
    _remove_given_up(config.workdir)
    note_current(config, result)
    return result


def _copy_tokenizer(model: Path, folder: Path, digest: str) -> None:
    """With what belongs to it, so that later stages need no other file than the artifact's."""
    shutil.copyfile(model, tokenizer_in(folder))
    if sha256_of(tokenizer_in(folder)) != digest:
        raise DataError(f"tokenizer.model {model} has changed while the text was tokenized: run again")
    for path in companions(model):
        shutil.copyfile(path, folder / path.name)


def _give_up_parts(workdir: Path) -> None:
    """Rename them, so that an interrupted removal leaves no half of them, and any later run may go on with it."""
    if (workdir / PARTS).exists():
        (workdir / PARTS).rename(workdir / f"{_GIVEN_UP}{uuid.uuid4().hex[:12]}")


def _remove_given_up(workdir: Path) -> None:
    for folder in workdir.glob(f"{_GIVEN_UP}*"):
        shutil.rmtree(folder, ignore_errors=True)  # another run may be at it too


def ledger(config: RunConfig, prepared: StageResult) -> dict[str, Any]:
    """Counts per source and split, and what the run takes of each.

    Raises:
        DataError: the run would repeat a source more than data.max_epochs times.
    """
    return run_ledger(prepared.artifact.summary["sources"], config)
