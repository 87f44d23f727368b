"""The fastest layouts of a run that fit: tensor x pipeline x data parallelism, schedule of the pipeline, micro batch,
recomputation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import get_args

from pydantic import ValidationError

from neox_core.config import (
    ActivationCheckpointing,
    BatchGeometry,
    PipelineSchedule,
    RunConfig,
    batch_geometry,
    largest_batch,
)
from neox_core.errors import ConfigError
from neox_core.planning.activation_checkpointing import describe_modes, layer_modes
from neox_core.planning.hardware import Hardware
from neox_core.planning.memory import RESERVED_BYTES, memory_limit, stage_memory
from neox_core.planning.step_time import Prediction, predict

MICRO_BATCHES = (1, 2, 4, 8, 16)
SCHEDULES: tuple[PipelineSchedule, ...] = get_args(PipelineSchedule)
REACHED = {(32, 4096): 2416.0, (48, 8192): 296.0}
"""Tokens per second and GPU that Llemma reached on 256 A100-40GB (arXiv 2310.10631), by layers and hidden size."""


@dataclass(frozen=True)
class Choice:
    """A layout, and what it would take."""

    config: RunConfig
    geometry: BatchGeometry
    memory: int
    """Bytes on the fullest GPU."""
    recomputation: str
    """Of the first stage's layers, which keep the most."""
    prediction: Prediction


def fastest(config: RunConfig, hardware: Hardware, nodes: int | None = None, count: int = 10) -> list[Choice]:
    """The fastest layouts of the same batch that fit, first to last.

    Each layer computes again the least that memory allows. Tensor-parallel ranks stay on one node.
    """
    found = [choice for layout in _layouts(config, nodes) if (choice := choice_of(layout, hardware, nodes))]
    return sorted(found, key=lambda choice: choice.prediction.time.total)[:count]


def choice_of(config: RunConfig, hardware: Hardware, nodes: int | None = None) -> Choice | None:
    """What a layout would take, or None if it does not fit."""
    gpu_memory = hardware.memory_gib * 2**30
    geometry, available = largest_batch(config, nodes), memory_limit(config, gpu_memory)
    memory, modes = 0, list[tuple[ActivationCheckpointing, ...]]()
    for stage in range(config.parallel.pipeline):
        modes.append(layer_modes(config, geometry, stage, available))
        memory = max(memory, stage_memory(config, geometry, stage, modes[-1]).total)
        if memory > gpu_memory - RESERVED_BYTES:
            return None
    prediction = predict(config, batch_geometry(config, nodes), hardware, modes)
    return Choice(config, batch_geometry(config, nodes), memory, describe_modes(modes[0]), prediction)


def _layouts(config: RunConfig, nodes: int | None) -> Iterator[RunConfig]:
    """Those that the model and the batch allow."""
    node = config.launch.ranks_per_node
    world = (nodes or config.launch.nodes) * node
    for tensor in _divisors(node):
        for pipeline in _divisors(world // tensor):
            if pipeline > config.model.num_layers:
                continue
            for micro_batch, schedule in product(MICRO_BATCHES, SCHEDULES if pipeline > 1 else SCHEDULES[:1]):
                layout = _layout(config, tensor, pipeline, schedule, micro_batch)
                try:
                    layout = RunConfig.model_validate(layout.model_dump())
                    batch_geometry(layout, nodes)
                except (ValidationError, ConfigError):
                    continue  # heads that the ranks do not divide, or too few micro batches for them
                yield layout


def _layout(config: RunConfig, tensor: int, pipeline: int, schedule: PipelineSchedule, micro_batch: int) -> RunConfig:
    degrees = {
        "tensor": tensor,
        "pipeline": pipeline,
        "pipeline_layers": None,
        "pipeline_schedule": schedule,
    }
    train = {"micro_batch_size": micro_batch, "activation_checkpointing": "auto"}
    return config.model_copy(
        update={
            "parallel": config.parallel.model_copy(update=degrees),
            "train": config.train.model_copy(update=train),
        }
    )


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
