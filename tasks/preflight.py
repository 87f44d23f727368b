"""Checks that cost seconds, before any work that costs hours."""

from __future__ import annotations

from infra.s3.service import EMBEDDED
from neox_core.config import RunConfig, batch_geometry
from neox_core.storage.object_store import ObjectStore
from tasks.jobs.launch import check_launch
from tasks.specs import convert_spec
from tasks.tokenization.tokenize import checked_inputs


def check_run(config: RunConfig) -> None:
    """Check the batch, the launcher, the input files, the tokenizer, the object store and the base weights' files.

    The embedded object store is not looked at: it is checked when it is started.

    Raises:
        ConfigError, DataError, LaunchError, StorageError: the first thing that would keep the run from finishing.
    """
    batch_geometry(config)
    check_launch(config.launch)
    checked_inputs(config)
    if config.storage.endpoint_url != EMBEDDED:
        ObjectStore(config.storage).check()
    convert_spec(config)
