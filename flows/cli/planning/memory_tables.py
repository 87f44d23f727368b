"""The tables of `llemma plan`: memory and communication by pipeline stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

from rich.table import Table

from neox_core.planning.memory import Memory
from neox_core.planning.plan import Plan
from neox_core.simulate import RankSimulation
from neox_core.units import format_bytes

_PURPOSES = {
    ("tensor", "all-reduce"): "sums of hidden states and their gradients",
    ("tensor", "all-gather"): "hidden states and their gradients put together",
    ("tensor", "reduce-scatter"): "sums of hidden states and their gradients",
    ("pipeline", "send"): "hidden states and their gradients",
    ("pipeline", "receive"): "hidden states and their gradients",
    ("data", "reduce"): "gradients of matrices, by buckets",
    ("data", "reduce-scatter"): "gradients of norms",
    ("data", "broadcast"): "updated matrices, by buckets",
    ("data", "all-gather"): "updated norms",
    ("all", "all-reduce"): "loss, gradient norms, tokens that count",
}


def memory_table(plan: Plan, simulated: Sequence[RankSimulation] = ()) -> Table:
    """Memory of each rank of each pipeline stage, by part; next to the total, what was simulated."""
    table = _table("memory per GPU", plan)
    table.add_row("layers", *(str(stage.layers) for stage in plan.stages))
    table.add_row("computed again", *(stage.activation_checkpointing for stage in plan.stages))
    for part in fields(Memory):
        table.add_row(part.name, *(format_bytes(getattr(stage.memory, part.name)) for stage in plan.stages))
    table.add_row("total", *(format_bytes(stage.memory.total) for stage in plan.stages), style="bold")
    if simulated:
        planned = [stage.memory for stage in plan.stages]
        pairs = list(zip(simulated, planned, strict=True))
        table.add_row("simulated between steps", *(_against(found.state, memory.state) for found, memory in pairs))
        table.add_row("simulated peak", *(_against(found.step_peak, memory.total) for found, memory in pairs))
        table.add_row("simulated peak at the start", *(format_bytes(found.start_peak) for found in simulated))
    return table


def traffic_table(plan: Plan, simulated: Sequence[RankSimulation] = ()) -> Table:
    """Bytes of a step's collectives on each rank; where they were simulated, those, and how far the plan is off."""
    table = _table("communication per GPU and step", plan)
    found = [rank.collective_bytes for rank in simulated] or [stage.traffic for stage in plan.stages]
    for key in sorted({key for stage in (*plan.stages,) for key in stage.traffic}):
        group, kind = key
        name = f"{group} {kind}: {_PURPOSES.get(key, '')}"
        cells = (
            _against(size.get(key, 0), stage.traffic[key]) if simulated else format_bytes(stage.traffic[key])
            for size, stage in zip(found, plan.stages, strict=True)
        )
        table.add_row(name, *cells)
    table.add_row("sent by each GPU, in rings", *(format_bytes(stage.sent) for stage in plan.stages), style="bold")
    return table


def _table(title: str, plan: Plan) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("", style="bold")
    for stage in range(len(plan.stages)):
        table.add_column(f"stage {stage}" if len(plan.stages) > 1 else "", justify="right", no_wrap=True)
    return table


def _against(found: int, planned: int) -> str:
    """What was found, and the plan's difference from it."""
    return f"{format_bytes(found)} ({planned / found - 1:+.1%})" if found else f"0 ({format_bytes(planned)} planned)"
