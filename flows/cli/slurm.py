"""`llemma slurm`: what goes to SLURM."""

from __future__ import annotations

import typer

from flows.cli.options import ConfigArgument, SetOption
from neox_core.config import load_config


def render(config: ConfigArgument, overrides: SetOption = None) -> None:
    """Print the sbatch script of the training job, without submitting it or asking SLURM."""
    from neox_core.train.ends.saving import SAVED_FILE
    from tasks.jobs.executor import Submission
    from tasks.jobs.launch import resources_of
    from tasks.jobs.slurm.executor import script

    loaded = load_config(config, overrides or ())
    launch, saved = loaded.launch, loaded.workdir / "FINGERPRINT" / SAVED_FILE
    resources = resources_of(launch, launch.nodes, launch.ranks_per_node, saved)
    folder = loaded.workdir / "jobs" / "FINGERPRINT" / "attempt-0001"
    typer.echo(script(Submission(f"llemma-train-{loaded.name}", folder, [], resources)))
