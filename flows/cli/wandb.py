"""`llemma wandb`: runs of Weights & Biases."""

from __future__ import annotations

import typer

from flows.cli.options import ConfigArgument, SetOption
from neox_core.config import load_config
from neox_core.errors import ConfigError


def sync(config: ConfigArgument, overrides: SetOption = None) -> None:
    """Upload what the training and the evaluation wrote offline, by `wandb sync`; again: what is new."""
    from tasks.identity.training import find_training
    from tasks.report.wandb_runs import upload_runs, wandb_links

    training = find_training(load_config(config, overrides or ()))
    if training is None:
        raise ConfigError(f"no training was begun as {config} stands: there is nothing to upload")
    uploaded = upload_runs(training)
    typer.echo(f"{uploaded} offline runs of W&B uploaded")
    for what, where in wandb_links(training).items():
        typer.echo(f"{what}: {where}")
