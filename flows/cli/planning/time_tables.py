"""The tables of `llemma plan` on time: a step's parts, and the fastest layouts."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from neox_core.config import RunConfig
from neox_core.planning.hardware import Hardware
from neox_core.planning.search import REACHED, Choice
from neox_core.planning.step_time import Prediction
from neox_core.units import format_bytes

_COLUMNS = (
    "",
    "TP",
    "PP",
    "schedule",
    "DP",
    "micro batch",
    "of them",
    "computed again",
    "memory",
    "step",
    "tokens/s/GPU",
    "MFU",
    "exchanges, bubble",
)


def time_table(prediction: Prediction, hardware: Hardware, config: RunConfig) -> Table:
    """A step's parts on the pipeline stage that all wait for."""
    slower = "" if config.train.precision == "bf16" else " at the rates of bf16, which fp32 does not reach"
    table = Table(title=f"a step on {hardware.name}, predicted{slower}", show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column()
    for name, value in prediction.rows():
        table.add_row(name, value)
    return table


def best_table(configured: Choice | None, choices: Sequence[Choice], hardware: Hardware, config: RunConfig) -> Table:
    """The fastest layouts, below the one that is configured, if it fits."""
    gpus = choices[0].geometry.world_size if choices else 0
    title = f"the fastest layouts on {gpus} {hardware.name}" if choices else f"no layout fits {hardware.name}"
    table = Table(title=title, title_justify="left", caption=_caption(config), caption_justify="left")
    for column in _COLUMNS:
        table.add_column(
            column, justify="left" if column in ("", "schedule", "computed again") else "right", no_wrap=not column
        )
    if configured:
        table.add_row("as configured", *_cells(configured, hardware))
    for place, choice in enumerate(choices, 1):
        table.add_row(str(place), *_cells(choice, hardware))
    return table


def _cells(choice: Choice, hardware: Hardware) -> list[str]:
    parallel, time = choice.config.parallel, choice.prediction.time
    waiting = time.tensor_exchange + time.pipeline_exchange + time.data_exchange + time.bubble
    return [
        str(parallel.tensor),
        str(parallel.pipeline),
        parallel.pipeline_schedule if parallel.pipeline > 1 else "",
        str(choice.geometry.data_parallel),
        str(choice.geometry.micro_batch_size),
        str(choice.geometry.accumulation_steps),
        choice.recomputation,
        format_bytes(choice.memory),
        f"{time.total:.2f} s",
        f"{choice.prediction.tokens_per_second_per_gpu:,.0f}",
        f"{choice.prediction.utilisation(choice.config, hardware):.1%}",
        f"{waiting / time.total:.1%}",
    ]


def _caption(config: RunConfig) -> str | None:
    reached = REACHED.get((config.model.num_layers, config.model.hidden_size))
    return f"Llemma reached {reached:,.0f} tokens/s/GPU on 256 A100-40GB (arXiv 2310.10631)" if reached else None
