"""The `llemma` command."""

from __future__ import annotations

import sys
from typing import NoReturn

import typer
from rich.console import Console
from rich.markup import escape

from flows.cli.checkpoints import convert, export, inspect, make_base
from flows.cli.config import import_neox_files
from flows.cli.evaluation import evaluate_app
from flows.cli.planning.commands import data_plan, plan
from flows.cli.runs import run
from flows.cli.services import down, up
from flows.cli.slurm import render
from flows.cli.status import doctor, logs, status
from flows.cli.stored import checkpoint_app
from flows.cli.wandb import sync
from neox_core.errors import LlemmaError

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__, pretty_exceptions_enable=False)
config_app = typer.Typer(no_args_is_help=True, help="Read and translate configurations.")
data_app = typer.Typer(no_args_is_help=True, help="Look at the training data.")
slurm_app = typer.Typer(no_args_is_help=True, help="What goes to SLURM.")
wandb_app = typer.Typer(no_args_is_help=True, help="Runs of Weights & Biases.")

for command in (run, up, down, status, logs, doctor, plan, make_base, convert, export, inspect):
    app.command()(command)
config_app.command("import")(import_neox_files)
data_app.command("plan")(data_plan)
slurm_app.command("render")(render)
wandb_app.command("sync")(sync)
app.add_typer(config_app, name="config")
app.add_typer(data_app, name="data")
app.add_typer(slurm_app, name="slurm")
app.add_typer(wandb_app, name="wandb")
app.add_typer(evaluate_app, name="evaluate")
app.add_typer(checkpoint_app, name="checkpoint")


def main() -> None:
    """Run the command; errors that users can mend are one line on standard error."""
    try:
        app()
    except LlemmaError as error:
        _fail(str(error))
    except OSError as error:
        if error.filename is None:  # no error of a file, such as a reader of the output that has left
            raise
        _fail(f"{error.filename}: {error.strerror}: correct the path, its rights or its disk")


def _fail(text: str) -> NoReturn:
    message = escape(" ".join(text.split()))
    Console(stderr=True, highlight=False, soft_wrap=True).print(f"[bold red]error:[/] {message}", emoji=False)
    sys.exit(1)
