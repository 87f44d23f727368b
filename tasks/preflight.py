"""Checks that cost seconds, before any work that costs hours."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Collection
from pathlib import Path

from neox_core.checkpoint.formats.huggingface_tokenizer import PLAIN_TOKENIZER, tokenizer_problem
from neox_core.config import EMBEDDED, RunConfig, batch_geometry
from neox_core.config.families import FamilyName
from neox_core.data.tokenization.tokenizer_file import TokenizerKind, kind_of_file
from neox_core.errors import ConfigError
from neox_core.evaluation.lengths import check_item_sets
from neox_core.storage.object_store import ObjectStore
from tasks.evaluation.generation import check_generation
from tasks.identity.base import check_base
from tasks.identity.current import current, outlived
from tasks.identity.specs import CONVERT, EVALUATE, EXPORT, PREPARE_DATA, STAGES, TRAIN
from tasks.jobs.launch import check_launch
from tasks.jobs.registry import executor_named
from tasks.tokenization.array import task_resources
from tasks.tokenization.estimate import check_repeats
from tasks.tokenization.tokenize import checked_inputs

logger = logging.getLogger(__name__)


def check_run(config: RunConfig, stages: Collection[str] = STAGES) -> None:
    """Check what these stages need: the batch, the launcher, the evaluation sets, the input files and the tokenizer,
    the object store, the base weights' files; of stages that are not among them, that they were finished.

    Raw inputs that are gone do no harm where what was made of them is intact. The embedded object store is not looked
    at: it is checked when it is started.

    Raises:
        LlemmaError, ConfigError, DataError, LaunchError, StorageError: the first thing that would keep them from
            finishing.
    """
    batch_geometry(config)
    if TRAIN in stages:
        _check_warmup(config)
    check_workdir(config.workdir)
    later = not {PREPARE_DATA, CONVERT}.issuperset(stages)
    if {TRAIN, EVALUATE}.intersection(stages):
        check_launch(config.launch)
    if EVALUATE in stages:
        check_item_sets(config)
        check_generation(config)
        _check_writer(config)
    if PREPARE_DATA in stages and not outlived(config, PREPARE_DATA):
        if config.data.slurm:
            executor_named(config.data.slurm.executor).check(task_resources(config.data.slurm))
        check_repeats(checked_inputs(config), config)
    if later and config.storage.endpoint_url != EMBEDDED:
        ObjectStore(config.storage).check()
    if CONVERT in stages and not outlived(config, CONVERT):
        check_base(config)
    if EXPORT in stages:
        note_tokenizer(config.tokenizer.file, config.model.family)
    for stage in (PREPARE_DATA, CONVERT):
        if later and stage not in stages:
            current(config, stage)


def check_workdir(workdir: Path) -> None:
    """Make the workdir, and find out whether files can be written there.

    Raises:
        ConfigError: they cannot, or it is no folder.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=workdir) as probe:
            probe.write(b"x")
    except OSError as error:
        raise ConfigError(
            f"workdir {workdir} cannot be written: {error.strerror}: set workdir to a folder on a disk with space "
            "where you may write"
        ) from None


def note_tokenizer(path: Path, family: FamilyName) -> None:
    """Say now what the export will say of it, weeks later."""
    if problem := _without_equal(path, family):
        logger.warning(
            "tokenizer %s %s, so no equal tokenizer.json can be written: export gives its own file next to the model, "
            "as %s",
            path,
            problem,
            PLAIN_TOKENIZER,
        )


def _without_equal(path: Path, family: FamilyName) -> str | None:
    """Why a tokenizer cannot be exported as transformers reads it; None: it can, or is not there any more."""
    if not path.is_file() or kind_of_file(path) is not TokenizerKind.SENTENCEPIECE:
        return None
    return tokenizer_problem(path, family)


def _check_writer(config: RunConfig) -> None:
    """Check that the exports of this run can write answers."""
    if (generate := config.evaluate.generate) is None:
        return
    from neox_core.checkpoint.formats.huggingface_config import positions  # imports torch

    if generate.max_tokens >= (length := positions(config.model, config.train.sequence_length)):
        raise ConfigError(
            f"evaluate.generate.max_tokens {generate.max_tokens} leaves no room for a prompt in the {length} positions "
            "that exports of this run have, by train.sequence_length: give fewer"
        )
    path = config.tokenizer.file
    if problem := _without_equal(path, config.model.family):
        raise ConfigError(
            f"evaluate.generate: tokenizer {path} {problem}, so no equal tokenizer.json can be written, and "
            "transformers, by which answers are written, cannot read it: give a tokenizer.json as tokenizer.model, or "
            "leave generate out"
        )


def _check_warmup(config: RunConfig) -> None:
    warmup, steps = config.train.schedule.warmup_steps, config.train.steps
    if warmup > steps:
        raise ConfigError(
            f"train.schedule.warmup_steps {warmup} is more than train.steps {steps}, so that the learning rate would "
            "never reach its peak: lower warmup_steps or raise steps"
        )
