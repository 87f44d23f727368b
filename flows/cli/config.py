"""`llemma config`: read and translate configurations."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flows.cli.options import OverwriteOption, place_option
from neox_core.errors import ConfigError


def import_neox_files(
    files: Annotated[list[Path], typer.Argument(help="GPT-NeoX YAML files, merged in this order.")],
    output: Annotated[
        Path | None, place_option("--output", "-o", help="File to write; default: standard output.")
    ] = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Translate GPT-NeoX YAML into our form. Every key is mapped, listed as without effect, or an error."""
    from neox_core.config.neox.yaml_import import import_neox, to_yaml
    from neox_core.storage.atomic import write_atomically

    if output is not None and output.exists() and not overwrite:
        raise ConfigError(f"{output} exists: choose another name for --output, or replace it with --overwrite")
    text = to_yaml(import_neox(files))
    if output is None:
        typer.echo(text)
        return
    try:
        write_atomically(output, text)
    except OSError as error:
        raise ConfigError(f"{output} cannot be written: {error.strerror or error}") from None
