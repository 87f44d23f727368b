"""The `llemma` command."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from infra.prefect_server import own_prefect_server
from neox_core.config import load_config
from neox_core.errors import LlemmaError

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__, pretty_exceptions_enable=False)
config_app = typer.Typer(no_args_is_help=True, help="Read and translate configurations.")
app.add_typer(config_app, name="config")

ConfigArgument = Annotated[Path, typer.Argument(help="The run's YAML file.")]


def main() -> None:
    """Run the command; errors that users can mend are one line on standard error."""
    try:
        app()
    except LlemmaError as error:
        message = escape(" ".join(str(error).split()))
        Console(stderr=True, highlight=False, soft_wrap=True).print(f"[bold red]error:[/] {message}", emoji=False)
        sys.exit(1)


@app.command()
def run(config: ConfigArgument) -> None:
    """Run the whole chain here and now; finished stages are skipped."""
    from tasks.preflight import check_run

    loaded = load_config(config)
    check_run(loaded)  # the flow does so too, but its server takes seconds to start
    _quiet_prefect(loaded.workdir)
    own_prefect_server()
    from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings

    from flows.llemma_pretrain import llemma_pretrain

    # Heartbeats tell a server that a run on another machine lives; here they cost a second per flow.
    with temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}):
        report = llemma_pretrain(str(config))
    _print_rows(f"llemma-pretrain {config}", report.rows)


@app.command()
def plan(
    config: ConfigArgument,
    nodes: Annotated[int | None, typer.Option(help="Number of nodes; default: launch.nodes.")] = None,
    utilisation: Annotated[float, typer.Option(help="Model FLOPs utilisation to reckon with.")] = 0.4,
    peak_tflops: Annotated[float, typer.Option(help="Peak bf16 TFLOP/s of one GPU; A100: 312.")] = 312.0,
) -> None:
    """Will it fit, how long will it take, is the batch still what it should be?"""
    from neox_core.plan import plan as make_plan

    _print_rows(f"plan of {config}", make_plan(load_config(config), nodes, utilisation, peak_tflops).rows())


@app.command("make-base")
def make_base(config: ConfigArgument) -> None:
    """Make the toy base model that base_model.random_seed describes, in Meta's format, if it is not there."""
    from tasks.specs import convert_spec

    loaded = load_config(config)
    convert_spec(loaded)
    _print_rows("base model", [("folder", str(loaded.base_model.path))])


@config_app.command("import")
def import_neox_files(
    files: Annotated[list[Path], typer.Argument(help="GPT-NeoX YAML files, merged in this order.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write; default: standard output.")
    ] = None,
) -> None:
    """Translate GPT-NeoX YAML into our form. Every key is mapped, listed as without effect, or an error."""
    from neox_core.config.neox_yaml import import_neox, to_yaml

    text = to_yaml(import_neox(files))
    if output is None:
        typer.echo(text)
    else:
        output.write_text(text, encoding="utf-8")


def _print_rows(title: str, rows: list[tuple[str, str]]) -> None:
    table = Table(title=title, show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, value)
    Console().print(table)


def _quiet_prefect(workdir: Path) -> None:
    """Before Prefect is imported: its embedded server keeps its data in the run's folder, and only errors are shown."""
    home = workdir / "prefect"
    home.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("PREFECT_HOME", str(home))
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    os.environ.setdefault("PREFECT_LOGGING_LEVEL", "CRITICAL")
    os.environ.setdefault("PREFECT_LOGGING_ROOT_LEVEL", "WARNING")
    os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "120")
    os.environ.setdefault("DO_NOT_TRACK", "1")
    os.environ.setdefault("TQDM_DYNAMIC_NCOLS", "1")
