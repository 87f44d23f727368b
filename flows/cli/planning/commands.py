"""`llemma plan` and `llemma data plan`: what a run will take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from flows.cli.options import ConfigArgument, SetOption, place_option
from flows.cli.printing import print_rows, wide_console
from neox_core.config import RunConfig, batch_geometry, load_config
from neox_core.errors import ConfigError

if TYPE_CHECKING:
    from neox_core.planning.hardware import Hardware

_SINGLE = ("parallel.tensor=1", "parallel.pipeline=1", "parallel.pipeline_layers=null", "train.micro_batch_size=1")
"""A layout that all models allow; --best tries others of each."""


def plan(
    config: ConfigArgument,
    nodes: Annotated[int | None, typer.Option(min=1, help="Number of nodes; default: launch.nodes.")] = None,
    hardware: Annotated[
        str, typer.Option(help="a100-40gb, a100-80gb, h100, h200, or a file that --calibrate wrote.")
    ] = "a100-40gb",
    utilisation: Annotated[
        float | None, typer.Option(min=1e-3, help="Model FLOPs utilisation to reckon with; default: as predicted.")
    ] = None,
    peak_tflops: Annotated[
        float | None, typer.Option(min=1e-3, max=1e6, help="Peak bf16 TFLOP/s of one GPU; default: the hardware's.")
    ] = None,
    gpu_memory: Annotated[
        float | None, typer.Option(min=1e-3, max=1e6, help="GiB of one GPU's memory; default: the hardware's.")
    ] = None,
    simulate: Annotated[
        bool, typer.Option("--simulate", help="Also run a step at full size without data, and measure.")
    ] = False,
    best: Annotated[
        bool, typer.Option("--best", help="Also show the ten fastest layouts of these nodes that fit.")
    ] = False,
    calibrate: Annotated[
        Path | None, place_option(help="Measure this node first, write its figures to this file, and use them.")
    ] = None,
    overrides: SetOption = None,
) -> None:
    """Will it fit, how long will it take, what is sent, is the batch still what it should be?"""
    from flows.cli.planning.memory_tables import memory_table, traffic_table
    from flows.cli.planning.time_tables import best_table, time_table
    from neox_core.evaluation.cost import cost_rows
    from neox_core.planning.plan import plan as make_plan
    from neox_core.planning.search import choice_of, fastest
    from neox_core.planning.step_time import predict_run
    from neox_core.simulate import simulate as run_simulation

    loaded, problem = _load(config, overrides or (), nodes, best and not simulate)
    card = _figures(loaded, hardware, calibrate)
    card = replace(card, memory_gib=gpu_memory or card.memory_gib)
    console = wide_console()
    if problem is not None:
        if not (choices := fastest(loaded, card, nodes)):
            raise problem
        console.print(Text(f"not as configured: {problem}"))
        console.print(best_table(None, choices, card, loaded))
        return
    predicted = predict_run(loaded, card, nodes)
    peak = peak_tflops or card.peak / 1e12
    reached = predicted.utilisation(loaded, replace(card, peak=peak * 1e12)) / batch_geometry(loaded, nodes).busy
    share = utilisation or min(1.0, reached)
    made = make_plan(loaded, nodes, share, peak, card.memory_gib)
    print_rows(f"plan of {config}", [*made.rows(), *cost_rows(loaded)])
    found = run_simulation(loaded, nodes, made.gpu_memory) if simulate else []
    console.print(memory_table(made, found))
    console.print(traffic_table(made, found))
    console.print(time_table(predicted, card, loaded))
    if best:
        console.print(best_table(choice_of(loaded, card, nodes), fastest(loaded, card, nodes), card, loaded))


def _load(
    path: Path, overrides: Sequence[str], nodes: int | None, any_layout: bool
) -> tuple[RunConfig, ConfigError | None]:
    """The configuration; where its layout cannot be run and any will do, one with another, and what is wrong.

    Raises:
        ConfigError: it cannot be run, whatever the layout.
    """
    try:
        loaded = load_config(path, overrides)
        batch_geometry(loaded, nodes)
    except ConfigError as problem:
        if not any_layout:
            raise
        try:
            return load_config(path, (*overrides, *_SINGLE)), problem
        except ConfigError:
            raise problem from None
    return loaded, None


def _figures(config: RunConfig, hardware: str, calibrate: Path | None) -> Hardware:
    """A card's, or this node's, which are measured and written to `calibrate` first."""
    from neox_core.planning.calibration import calibrate as measure
    from neox_core.planning.hardware import load_hardware

    if calibrate is None:
        return load_hardware(hardware)
    if calibrate.exists():
        raise ConfigError(f"--calibrate {calibrate} exists: give another file, or read it with --hardware")
    measure(config).save(calibrate)
    return load_hardware(str(calibrate))


def data_plan(config: ConfigArgument, overrides: SetOption = None) -> None:
    """What there is of each source and what the run will take; fails if it would repeat one too often."""
    from flows.cli.planning.data_tables import changes_table, plan_table
    from neox_core.data.ledger import check_epochs, plan_ledger
    from tasks.identity.current import current
    from tasks.identity.specs import PREPARE_DATA
    from tasks.identity.stage import require

    loaded = load_config(config, overrides or ())
    ledger = plan_ledger(require(current(loaded, PREPARE_DATA)).summary["sources"], loaded)
    console = wide_console()
    console.print(plan_table(f"data plan of {config}, {loaded.train.steps:,} steps", ledger))
    if ledger["changes"]:
        console.print(changes_table(ledger))
    check_epochs(ledger, loaded)
