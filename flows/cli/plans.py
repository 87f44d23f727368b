"""`llemma plan` and `llemma data plan`: what a run will take."""

from __future__ import annotations

from typing import Annotated

import typer

from flows.cli.options import ConfigArgument, SetOption
from flows.cli.printing import print_rows, wide_console
from neox_core.config import load_config


def plan(
    config: ConfigArgument,
    nodes: Annotated[int | None, typer.Option(min=1, help="Number of nodes; default: launch.nodes.")] = None,
    utilisation: Annotated[float, typer.Option(min=1e-3, help="Model FLOPs utilisation to reckon with.")] = 0.4,
    peak_tflops: Annotated[float, typer.Option(min=1e-3, help="Peak bf16 TFLOP/s of one GPU; A100: 312.")] = 312.0,
    gpu_memory: Annotated[float, typer.Option(min=1e-3, help="GiB of one GPU's memory; A100: 40 or 80.")] = 40.0,
    simulate: Annotated[
        bool, typer.Option("--simulate", help="Also run a step at full size without data, and measure.")
    ] = False,
    overrides: SetOption = None,
) -> None:
    """Will it fit, how long will it take, what is sent, is the batch still what it should be?"""
    from flows.cli.plan_tables import memory_table, traffic_table
    from neox_core.evaluation.cost import cost_rows
    from neox_core.planning.plan import plan as make_plan
    from neox_core.simulate import simulate as run_simulation

    loaded = load_config(config, overrides or ())
    made = make_plan(loaded, nodes, utilisation, peak_tflops, gpu_memory)
    print_rows(f"plan of {config}", [*made.rows(), *cost_rows(loaded)])
    found = run_simulation(loaded, nodes, made.gpu_memory) if simulate else []
    console = wide_console()
    console.print(memory_table(made, found))
    console.print(traffic_table(made, found))


def data_plan(config: ConfigArgument, overrides: SetOption = None) -> None:
    """What there is of each source and what the run will take; fails if it would repeat one too often."""
    from flows.cli.data_plan_tables import changes_table, plan_table
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
