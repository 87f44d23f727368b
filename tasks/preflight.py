"""Checks that cost seconds, before any work that costs hours."""

from __future__ import annotations

import shutil

from neox_core.config import RunConfig, batch_geometry
from neox_core.errors import LaunchError
from tasks.specs import convert_spec
from tasks.tokenize import checked_inputs


def check_run(config: RunConfig) -> None:
    """Check the batch, the input files, the tokenizer, the base weights' files and the launcher.

    Raises:
        ConfigError, DataError, LaunchError: the first thing that would keep the run from finishing.
    """
    batch_geometry(config)
    if config.launch.executor == "slurm" and shutil.which("sbatch") is None:
        raise LaunchError(
            "launch.executor is 'slurm' but sbatch is not on the PATH: run on a login node, or use 'auto'"
        )
    checked_inputs(config)
    convert_spec(config)
