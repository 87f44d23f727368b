"""Checks that cost seconds, before any work that costs hours."""

from __future__ import annotations

from collections.abc import Collection

from infra.s3.service import EMBEDDED
from neox_core.config import RunConfig, batch_geometry
from neox_core.storage.object_store import ObjectStore
from tasks.base import check_base
from tasks.current import current, outlived
from tasks.jobs.launch import check_launch
from tasks.specs import CONVERT, EVALUATE, PREPARE_DATA, STAGES, TRAIN
from tasks.tokenization.tokenize import checked_inputs


def check_run(config: RunConfig, stages: Collection[str] = STAGES) -> None:
    """Check what these stages need: the batch, the launcher, the input files and the tokenizer, the object store, the
    base weights' files; of stages that are not among them, that they were finished.

    Raw inputs that are gone do no harm where what was made of them is intact. The embedded object store is not looked
    at: it is checked when it is started.

    Raises:
        LlemmaError, ConfigError, DataError, LaunchError, StorageError: the first thing that would keep them from
            finishing.
    """
    batch_geometry(config)
    later = not {PREPARE_DATA, CONVERT}.issuperset(stages)
    if {TRAIN, EVALUATE}.intersection(stages):
        check_launch(config.launch)
    if PREPARE_DATA in stages and not outlived(config, PREPARE_DATA):
        checked_inputs(config)
    if later and config.storage.endpoint_url != EMBEDDED:
        ObjectStore(config.storage).check()
    if CONVERT in stages and not outlived(config, CONVERT):
        check_base(config)
    for stage in (PREPARE_DATA, CONVERT):
        if later and stage not in stages:
            current(config, stage)
