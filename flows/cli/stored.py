"""A training's checkpoints in the store: `llemma checkpoint ls`, `verify`, `fetch` and `rm`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flows.cli.options import ConfigArgument, SetOption, place_option
from flows.cli.printing import bar, print_records, print_rows
from neox_core.config import load_config
from neox_core.errors import CheckpointError

checkpoint_app = typer.Typer(no_args_is_help=True, help="List, verify, fetch and remove a training's checkpoints.")

_GIB = 2**30
_StepOption = Annotated[int | None, typer.Option("--step", min=0, help="The checkpoint's step; none: the newest one.")]


@checkpoint_app.command("ls")
def ls(config: ConfigArgument, overrides: SetOption = None) -> None:
    """The training's checkpoints: step, whether complete, size, and what was consumed."""
    from tasks.stored_checkpoints import opened_training, stored_checkpoints

    with opened_training(load_config(config, overrides or ())) as training:
        found = stored_checkpoints(training)
        records = [
            {
                "step": entry.step,
                "state": entry.state,
                "files": entry.files,
                "GiB": entry.bytes / _GIB,
                "sequences": entry.manifest.sequences_consumed if entry.manifest else None,
                "place": entry.place,
            }
            for entry in found
        ]
        print_records(f"checkpoints in {training.store.url()}: {len(records)}", records)


@checkpoint_app.command("verify")
def verify(config: ConfigArgument, step: _StepOption = None, overrides: SetOption = None) -> None:
    """Read a checkpoint from the store and compare every file's SHA-256 with the manifest's."""
    from tasks.stored_checkpoints import opened_training
    from tasks.stored_checkpoints import verify as verify_step

    with opened_training(load_config(config, overrides or ())) as training, bar("verify") as progress:
        found, damaged = verify_step(training, step, progress)
    if damaged:
        raise CheckpointError(f"step {found}: {len(damaged)} files are not what was written: {', '.join(damaged)}")
    print_rows("checkpoint", [("step", str(found)), ("verified", "every file is as it was written")])


@checkpoint_app.command("fetch")
def fetch(
    config: ConfigArgument,
    to: Annotated[Path, place_option("--to", help="Folder, in which the checkpoint's own appears.")],
    step: _StepOption = None,
    overrides: SetOption = None,
) -> None:
    """Bring a checkpoint to a folder, every file verified."""
    from tasks.stored_checkpoints import fetch as fetch_step
    from tasks.stored_checkpoints import opened_training

    with opened_training(load_config(config, overrides or ())) as training:
        print_rows("checkpoint", [("folder", str(fetch_step(training, step, to)))])


@checkpoint_app.command("rm")
def rm(
    config: ConfigArgument,
    steps: Annotated[list[int], typer.Option("--step", min=0, help="The checkpoint's step; repeatable.")],
    force: Annotated[bool, typer.Option("--force", help="Remove the newest complete one too.")] = False,
    overrides: SetOption = None,
) -> None:
    """Remove checkpoints of the training from the store and from local disk. Not while it trains."""
    from tasks.stored_checkpoints import opened_training, remove

    with opened_training(load_config(config, overrides or ())) as training:
        for step in steps:
            removed = remove(training, step, force)
            print_rows("removed", [("step", str(step)), ("GiB", f"{removed / _GIB:.2f}")])
