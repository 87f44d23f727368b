"""What `benchmarks/node.py` measures on a number of GPUs, and the table of it with the planner's predictions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from benchmarks.commands import why
from benchmarks.train_step import parse_options, run_config
from neox_core.config import RunConfig, batch_geometry
from neox_core.planning.activation_checkpointing import layer_modes
from neox_core.planning.hardware import Hardware
from neox_core.planning.memory import RESERVED_BYTES, stage_memory
from neox_core.planning.step_time import predict

MICRO_BATCHES = (8, 4, 2, 1)
"""Of equals, the largest is taken: products of more rows are a little faster."""
MODES = ("none", "selective", "full")
START_SECONDS, STEPS = 120, 12
"""What a row takes at most: until its first step and after its last one, with a cold file system and kernels that are
compiled; and its 8 steps, were they half as long again as predicted."""
TOY = ("--tokens", "1024", "--sequence-length", "64", "--steps", "3", "--gemm-seconds", "0.2")


@dataclass(frozen=True)
class Row:
    """One measurement of `benchmarks.train_step`."""

    gpus: int
    arguments: tuple[str, ...]

    @property
    def key(self) -> str:
        """Its name in the file of results."""
        return f"{self.gpus} x {' '.join(self.arguments)}"

    @cached_property
    def config(self) -> RunConfig:
        """What it runs."""
        return run_config(parse_options(self.arguments), self.gpus)


def rows(gpus: int, hardware: Hardware, models: Sequence[str], toy: bool) -> Iterator[Row]:
    """One GPU, then every layout of powers of two that divides the GPUs, with graphs and overlap; then, for when there
    is time, each without one of them, and pipeline stages in the other schedule."""
    layouts = [
        (model, count, tensor, pipeline)
        for model in models
        for count in dict.fromkeys((1, gpus))
        for tensor in _powers_of_two(count)
        for pipeline in _powers_of_two(count // tensor)
    ]
    found = [row for layout in layouts if (row := fastest(*layout, hardware, toy=toy)) is not None]
    yield from found
    for row in found:
        yield from _switched(row, hardware)


def _switched(row: Row, hardware: Hardware) -> Iterator[Row]:
    parallel = row.config.parallel
    filled = Row(row.gpus, (*row.arguments, "--schedule", "zb-h1"))
    if parallel.pipeline > 1 and planned_bytes(filled) <= _room(hardware):
        yield filled
    yield Row(row.gpus, (*row.arguments, "--cuda-graphs", "off"))
    if parallel.tensor > 1:
        yield Row(row.gpus, (*row.arguments, "--overlap", "off"))


def fastest(
    model: str,
    gpus: int,
    tensor: int,
    pipeline: int,
    hardware: Hardware,
    modes: Sequence[str] = MODES,
    toy: bool = False,
) -> Row | None:
    """The layout with the micro batch and recomputation that are predicted to be fastest, in as many layers as fit."""
    degrees = ("--tp", str(tensor), "--pp", str(pipeline), *(TOY if toy else ()))
    whole = Row(gpus, (model, *degrees)).config.model.num_layers
    for layers in (whole, whole * 3 // 4, whole // 2, whole // 4):
        if layers < pipeline:
            continue
        candidates = [
            Row(gpus, (model, "--layers", str(layers), *degrees, "--micro-batch", str(size), _MODE, mode))
            for size in MICRO_BATCHES
            for mode in modes
        ]
        if fitting := [row for row in candidates if _divides(row.config) and planned_bytes(row) <= _room(hardware)]:
            return min(fitting, key=lambda row: predicted_seconds(row, hardware))
    return None


_MODE = "--activation-checkpointing"


def _room(hardware: Hardware) -> float:
    return hardware.memory_gib * 2**30 - RESERVED_BYTES


def _divides(config: RunConfig) -> bool:
    model, train, parallel = config.model, config.train, config.parallel
    heads = model.num_attention_heads % parallel.tensor == 0 and model.vocab_size % parallel.tensor == 0
    data = config.launch.world_size // (parallel.tensor * parallel.pipeline)
    return heads and train.global_batch_tokens % (train.sequence_length * train.micro_batch_size * data) == 0


def planned_bytes(row: Row) -> int:
    """The planner's memory of the fullest GPU."""
    config = row.config
    geometry = batch_geometry(config)
    stages = range(config.parallel.pipeline)
    modes = [layer_modes(config, geometry, stage, None) for stage in stages]
    return max(stage_memory(config, geometry, stage, modes[stage]).total for stage in stages)


def predicted_seconds(row: Row, hardware: Hardware) -> float:
    """The planner's time of a step."""
    config = row.config
    geometry = batch_geometry(config)
    modes = [layer_modes(config, geometry, stage, None) for stage in range(config.parallel.pipeline)]
    return predict(config, geometry, hardware, modes).time.total


def limit_seconds(row: Row, hardware: Hardware) -> float:
    """What it may take at most."""
    return START_SECONDS + STEPS * predicted_seconds(row, hardware)


def table(results: Sequence[dict[str, Any]], hardware: Hardware) -> str:
    """Every row that was measured, as Markdown."""
    names = (
        "model, layers|GPUs|TP|PP|schedule|micro batch|computed again|graphs|overlap|tokens/s/GPU|predicted||of GEMM|"
        "exposed"
    )
    lines = [f"| {' | '.join((*names.split('|'), 'peak GiB', 'planned'))} |", "|" + "---|" * (names.count("|") + 3)]
    lines += [_line(result, hardware) for result in results if "tokens_per_second" in result and "arguments" in result]
    for result in results:
        if "failed" in result:
            lines.append(f"\nfailed: {result['key']}: {why(result)[:300]}")
        if "peers" in result:
            rates = ", ".join(f"{name} {rate:,.0f}" for name, rate in result["peers"].items())
            lines.append(f"\n{result['key']}, tokens/s: {rates}")
    return "\n".join(lines)


def _line(result: dict[str, Any], hardware: Hardware) -> str:
    row = Row(result["gpus"], tuple(result["arguments"]))
    config, measured = row.config, result["tokens_per_second"]
    predicted = config.train.global_batch_tokens / row.gpus / predicted_seconds(row, hardware)
    exposed = result.get("parts_seconds", {}).get("exposed")
    cells = (
        f"{row.arguments[0]}, {config.model.num_layers}",
        row.gpus,
        config.parallel.tensor,
        config.parallel.pipeline,
        config.parallel.pipeline_schedule if config.parallel.pipeline > 1 else "",
        config.train.micro_batch_size,
        config.train.activation_checkpointing,
        config.train.cuda_graphs,
        config.parallel.overlap if config.parallel.tensor > 1 else "",
        f"{measured:,.0f}",
        f"{predicted:,.0f}",
        f"{predicted / measured - 1:+.1%}",
        f"{result['ratio_to_gemm']:.3f}" if result.get("ratio_to_gemm") else "",
        "" if exposed is None else f"{exposed / result['step_seconds']:.1%}",
        result["peak_memory_gib"],
        f"{planned_bytes(row) / 2**30:.1f}",
    )
    return f"| {' | '.join(map(str, cells))} |"


def _powers_of_two(limit: int) -> list[int]:
    return [2**power for power in range(limit.bit_length()) if limit % 2**power == 0]
