"""Weights between formats: `llemma make-base`, `convert`, `export` and `inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.table import Table

from flows.cli.options import ConfigArgument, OverwriteOption, SetOption
from flows.cli.printing import bar, print_artifact, print_rows, print_table
from neox_core.config import load_config
from neox_core.errors import ConfigError


def make_base(config: ConfigArgument, overrides: SetOption = None) -> None:
    """Make the toy base model that base_model.random_seed describes, in Meta's format, if it is not there."""
    from tasks.identity.base import check_base, make_toy_base

    loaded = load_config(config, overrides or ())
    make_toy_base(loaded)
    check_base(loaded)
    print_rows("base model", [("folder", str(loaded.base_model.path))])


def convert(
    source: Annotated[str, typer.Option("--from", help="Folder or s3:// prefix in Meta's or Hugging Face's format.")],
    target: Annotated[str, typer.Option("--to", help="Folder or s3:// prefix for NeoX shards.")],
    tp: Annotated[int, typer.Option(min=1, help="Tensor-parallel ranks.")] = 1,
    pp: Annotated[int, typer.Option(min=1, help="Pipeline stages; above 1, one file per layer and rank.")] = 1,
    vocab_multiple: Annotated[int, typer.Option(min=1, help="Pad the vocabulary to a multiple of this.")] = 1,
    overwrite: OverwriteOption = False,
) -> None:
    """Weights to NeoX shards for any TP x PP, refused unless every layer computes the same as in transformers."""
    from neox_core.config import ParallelConfig
    from tasks.checkpoints import convert_folder

    with bar("convert") as progress:
        parallel = ParallelConfig(tensor=tp, pipeline=pp)
        artifact = convert_folder(source, target, parallel, vocab_multiple, progress, overwrite)
    print_artifact(artifact)


def export(
    source: Annotated[
        str, typer.Option("--from", help="Folder or s3:// prefix of a NeoX or training checkpoint, any TP x PP x DP.")
    ],
    target: Annotated[str, typer.Option("--to", help="Folder or s3:// prefix to write.")],
    form: Annotated[
        Literal["huggingface", "meta"], typer.Option("--format", help="huggingface or meta.")
    ] = "huggingface",
    shards: Annotated[
        int | None, typer.Option(min=1, help="Files in Meta's format: 1 for 7B, 4 for 34B; default: 1.")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Tokenizer's file for a Hugging Face folder, or the folder of one.")
    ] = None,
    sequence_length: Annotated[
        int | None,
        typer.Option(min=1, help="Longest sequence that the model was trained on; default: 4096."),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="Run's YAML file with the architecture; default: --from's.")
    ] = None,
    overwrite: OverwriteOption = False,
) -> None:
    """A NeoX or training checkpoint to Hugging Face's or Meta's format, proven to compute the same."""
    from tasks.checkpoints import export_folder

    without_effect = (
        {"--tokenizer": tokenizer, "--sequence-length": sequence_length} if form == "meta" else {"--shards": shards}
    )
    if given := [option for option, value in without_effect.items() if value is not None]:
        raise ConfigError(f"{' and '.join(given)}: without effect with --format {form}: leave it out")
    run = None if config is None else load_config(config)
    with bar("export") as progress:
        artifact = export_folder(
            source,
            target,
            form,
            run.model if run else None,
            shards or 1,
            tokenizer,
            sequence_length or 4096,
            progress,
            overwrite,
            run.base_model.path if run else None,
        )
    print_artifact(artifact)


def inspect(
    folder: Annotated[str, typer.Argument(help="Folder or s3:// prefix in Meta's, Hugging Face's or NeoX's layout.")],
    config: Annotated[Path | None, typer.Option(help="Run's YAML file with the architecture, for NeoX.")] = None,
) -> None:
    """Layout, shapes, types, parameters, and where each tensor lives; reads no weights."""
    from neox_core.checkpoint.conversion.inspect import inspect as describe

    found = describe(folder, None if config is None else load_config(config).model)
    rows = [("layout", found.form), ("parameters", f"{found.parameters:,}")]
    rows += [(name, str(value)) for name, value in found.model.model_dump(exclude_none=True).items()]
    print_rows(str(folder), rows)
    table = Table("file", "tensor", "shape", "type", "belongs to")
    for entry in found.entries:
        table.add_row(entry.file, entry.name, " x ".join(map(str, entry.shape)), entry.dtype, entry.whole)
    print_table(table)
