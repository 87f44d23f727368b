"""The `llemma` command."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from infra.prefect_server import own_prefect_server
from neox_core.artifact import Artifact
from neox_core.config import load_config
from neox_core.errors import LlemmaError
from neox_core.progress import Progress
from tasks.checkpoints import ExportForm

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__, pretty_exceptions_enable=False)
config_app = typer.Typer(no_args_is_help=True, help="Read and translate configurations.")
app.add_typer(config_app, name="config")
data_app = typer.Typer(no_args_is_help=True, help="Look at the training data.")
app.add_typer(data_app, name="data")

_PLAN_WIDTH = 130
"""Columns that plans need, also where the output is no terminal."""

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
    gpu_memory: Annotated[float, typer.Option(help="GiB of one GPU's memory; A100: 40 or 80.")] = 40.0,
    simulate: Annotated[
        bool, typer.Option("--simulate", help="Also run a step at full size without data, and measure.")
    ] = False,
) -> None:
    """Will it fit, how long will it take, what is sent, is the batch still what it should be?"""
    from flows.plan_tables import memory_table, traffic_table
    from neox_core.planning.plan import plan as make_plan
    from neox_core.simulate import simulate as run_simulation

    loaded = load_config(config)
    made = make_plan(loaded, nodes, utilisation, peak_tflops, gpu_memory)
    _print_rows(f"plan of {config}", made.rows())
    found = run_simulation(loaded, nodes, made.gpu_memory) if simulate else []
    console = Console(highlight=False, width=max(Console().width, _PLAN_WIDTH))
    console.print(memory_table(made, found))
    console.print(traffic_table(made, found))


@app.command("make-base")
def make_base(config: ConfigArgument) -> None:
    """Make the toy base model that base_model.random_seed describes, in Meta's format, if it is not there."""
    from tasks.specs import convert_spec

    loaded = load_config(config)
    convert_spec(loaded)
    _print_rows("base model", [("folder", str(loaded.base_model.path))])


@app.command()
def convert(
    source: Annotated[str, typer.Option("--from", help="Folder or s3:// prefix in Meta's or Hugging Face's format.")],
    target: Annotated[str, typer.Option("--to", help="Folder or s3:// prefix for NeoX shards.")],
    tp: Annotated[int, typer.Option(min=1, help="Tensor-parallel ranks.")] = 1,
    pp: Annotated[int, typer.Option(min=1, help="Pipeline stages; above 1, one file per layer and rank.")] = 1,
    vocab_multiple: Annotated[int, typer.Option(min=1, help="Pad the vocabulary to a multiple of this.")] = 1,
) -> None:
    """Weights to NeoX shards for any TP x PP, refused unless every layer computes the same as in transformers."""
    from neox_core.config import ParallelConfig
    from tasks.checkpoints import convert_folder

    with _bar("convert") as progress:
        artifact = convert_folder(source, target, ParallelConfig(tensor=tp, pipeline=pp), vocab_multiple, progress)
    _print_artifact(artifact)


@app.command()
def export(
    source: Annotated[
        str, typer.Option("--from", help="Folder or s3:// prefix of a NeoX or training checkpoint, any TP x PP x DP.")
    ],
    target: Annotated[str, typer.Option("--to", help="Folder or s3:// prefix to write.")],
    form: Annotated[ExportForm, typer.Option("--format", help="huggingface or meta.")] = "huggingface",
    shards: Annotated[int, typer.Option(min=1, help="Files in Meta's format: 1 for 7B, 4 for 34B.")] = 1,
    tokenizer: Annotated[Path | None, typer.Option(help="SentencePiece model for a Hugging Face folder.")] = None,
    sequence_length: Annotated[int, typer.Option(help="Longest sequence that the model was trained on.")] = 4096,
    config: Annotated[
        Path | None, typer.Option(help="Run's YAML file with the architecture; default: --from's.")
    ] = None,
) -> None:
    """A NeoX or training checkpoint to Hugging Face's or Meta's format, proven to compute the same."""
    from tasks.checkpoints import export_folder

    model = None if config is None else load_config(config).model
    with _bar("export") as progress:
        artifact = export_folder(source, target, form, model, shards, tokenizer, sequence_length, progress)
    _print_artifact(artifact)


@app.command()
def inspect(
    folder: Annotated[str, typer.Argument(help="Folder or s3:// prefix in Meta's, Hugging Face's or NeoX's layout.")],
    config: Annotated[Path | None, typer.Option(help="Run's YAML file with the architecture, for NeoX.")] = None,
) -> None:
    """Layout, shapes, types, parameters, and where each tensor lives; reads no weights."""
    from neox_core.checkpoint.conversion.inspect import inspect as describe

    found = describe(folder, None if config is None else load_config(config).model)
    rows = [("layout", found.form), ("parameters", f"{found.parameters:,}")]
    rows += [(name, str(value)) for name, value in found.model.model_dump(exclude_none=True).items()]
    _print_rows(str(folder), rows)
    table = Table("file", "tensor", "shape", "type", "belongs to")
    for entry in found.entries:
        table.add_row(entry.file, entry.name, " x ".join(map(str, entry.shape)), entry.dtype, entry.whole)
    Console().print(table)


@config_app.command("import")
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


@data_app.command("plan")
def data_plan(config: ConfigArgument) -> None:
    """What there is of each source and what the run will take; fails if it would repeat one too often."""
    from flows.data_plan import changes_table, plan_table
    from neox_core.data.ledger import check_epochs, plan_ledger
    from tasks.specs import prepare_spec
    from tasks.stage import require

    loaded = load_config(config)
    ledger = plan_ledger(require(prepare_spec(loaded)).summary["sources"], loaded)
    console = Console(highlight=False, width=max(Console().width, _PLAN_WIDTH))
    console.print(plan_table(f"data plan of {config}, {loaded.train.steps:,} steps", ledger))
    if ledger["changes"]:
        console.print(changes_table(ledger))
    check_epochs(ledger, loaded)


@contextmanager
def _bar(what: str) -> Iterator[Progress]:
    """A bar on standard error: share, bytes, bytes/s and the time left."""
    from tqdm import tqdm

    with tqdm(total=1.0, desc=what, bar_format="{desc} {percentage:3.0f}%|{bar:24}| {elapsed} {postfix}") as bar:

        def progress(share: float, text: str) -> None:
            bar.set_postfix_str(text, refresh=False)
            bar.update(share - bar.n)

        yield progress


def _print_artifact(artifact: Artifact) -> None:
    from flows.checkpoint_table import checkpoint_rows

    _print_rows(f"{artifact.name}: {artifact.folder}", checkpoint_rows(artifact))


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
