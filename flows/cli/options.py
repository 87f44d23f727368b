"""Arguments and options that several commands have."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from neox_core.config.paths import local_path


def _on_disk(text: str) -> Path:
    """A place to write to, as configurations name places: `~` and variables are expanded, s3:// is refused."""
    try:
        return local_path(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


place_option = partial(typer.Option, parser=_on_disk, metavar="PATH")
"""As typer.Option, of a file or folder to write to."""

ConfigArgument = Annotated[Path, typer.Argument(help="The run's YAML file.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override a key of the file, such as train.steps=100, with a value as YAML has it; repeatable.",
    ),
]
OverwriteOption = Annotated[
    bool,
    typer.Option("--overwrite", help="Replace what is there, also if this command did not write it."),
]
