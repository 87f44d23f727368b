"""`llemma up` and `llemma down`: Prefect's server and the worker, which watches over all runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flows.cli.options import place_option

_FolderOption = Annotated[
    Path | None,
    place_option(
        "--workdir",
        help="For the server's data, logs and process ids; default: PREFECT_HOME, or runs/prefect.",
    ),
]
_PORT_HELP = "The server's, on loopback; default: PREFECT_SERVER_API_PORT, or 4200."
_DATABASE_HELP = (
    "postgresql+asyncpg://USER:PASSWORD@HOST/DATABASE; default: PREFECT_API_DATABASE_CONNECTION_URL, which nobody else "
    "sees, or SQLite in the workdir."
)


def up(
    workdir: _FolderOption = None,
    port: Annotated[int | None, typer.Option("--port", help=_PORT_HELP)] = None,
    database: Annotated[str | None, typer.Option("--database", help=_DATABASE_HELP)] = None,
) -> None:
    """Start Prefect's server and a worker, deploy all flows, and have all runs watched; what is up already stays."""
    from infra.prefect import services
    from infra.prefect import up as prefect

    prefect.up((workdir or services.default_folder()).resolve(), port, database, _say)


def down(workdir: _FolderOption = None) -> None:
    """End the server and the worker that `llemma up` has started; SLURM jobs go on, data and logs stay."""
    from infra.prefect import services
    from infra.prefect import up as prefect

    prefect.down((workdir or services.default_folder()).resolve(), _say)


def _say(what: str, text: str) -> None:
    typer.echo(f"{what}: {text}")
