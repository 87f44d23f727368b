"""`llemma config`: read and translate configurations."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def import_neox_files(
    files: Annotated[list[Path], typer.Argument(help="GPT-NeoX YAML files, merged in this order.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write; default: standard output.")
    ] = None,
) -> None:
    """Translate GPT-NeoX YAML into our form. Every key is mapped, listed as without effect, or an error."""
    from neox_core.config.neox.yaml_import import import_neox, to_yaml

    text = to_yaml(import_neox(files))
    if output is None:
        typer.echo(text)
    else:
        output.write_text(text, encoding="utf-8")
