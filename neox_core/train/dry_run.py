"""A step on made-up weights and data, before the real ones are touched: compiles, and finds out whether it fits.

Its weights are zeros, which cost no reading; then the real ones take their place and nothing else is left of it.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import time
from collections.abc import Iterator
from dataclasses import fields

import numpy as np
import torch
from torch import Tensor

from neox_core.config import BatchGeometry, RunConfig
from neox_core.errors import LaunchError
from neox_core.model import ModelDimensions
from neox_core.parallel.build import LayerWeights, layer_types
from neox_core.parallel.precision import parameter_dtype
from neox_core.parallel.ranks.mesh import Mesh
from neox_core.planning.activation_checkpointing import layer_modes
from neox_core.planning.memory import RESERVED_BYTES, stage_memory
from neox_core.train.engine.step_engine import Batches, StepEngine
from neox_core.train.loop import pipeline_batches

logger = logging.getLogger(__name__)

_GIB = 2**30


def zero_weights(config: RunConfig) -> LayerWeights:
    """Zeros in the shapes of each layer's weights: they give finite losses and gradients."""
    types = layer_types(config.model.num_layers)
    dims = ModelDimensions.of(config.model, config.train.sequence_length).shard(config.parallel.tensor)
    zero = torch.zeros((), dtype=parameter_dtype(config))

    def weights(index: int, tensor_rank: int) -> dict[str, Tensor]:
        layer_type = types[index]
        assert layer_type is not None, f"layer {index} has no weights"
        with torch.device("meta"):
            layer = layer_type(dims)
        return {name: zero.expand(tensor.shape) for name, tensor in layer.state_dict().items()}

    return weights


def dry_run(engine: StepEngine, config: RunConfig, geometry: BatchGeometry, mesh: Mesh) -> None:
    """Train and validate on zeros, with as many micro batches as fill the pipeline. Collective over all ranks."""
    started = time.perf_counter()
    count = min(geometry.accumulation_steps, 2 * mesh.pipeline_size)
    batches = _zero_batches(config)
    with torch.random.fork_rng(devices=[mesh.device] if mesh.device.type == "cuda" else []):
        engine.set_accumulation_steps(count)
        for _ in range(2):  # the second records CUDA graphs of what the first compiled, and replays them
            engine.train_batch(batches)
        engine.set_accumulation_steps(geometry.accumulation_steps)
        engine.eval_batch(batches, num_micro_batches=count)
    if mesh.device.type == "cuda":
        torch.cuda.synchronize()  # an error of the device belongs to this step
    seconds = time.perf_counter() - started
    logger.info("dry run: %d micro batches and their validation in %.1f s%s", count, seconds, _peak(mesh.device))


@contextlib.contextmanager
def memory_explained(config: RunConfig, geometry: BatchGeometry, mesh: Mesh) -> Iterator[None]:
    """Turn the device's out-of-memory error into one that says what there was, what was planned, and what to change."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        available = config.train.memory_gib and config.train.memory_gib * _GIB
        if available is None and mesh.device.type == "cuda":
            available = torch.cuda.mem_get_info(mesh.device)[1] - RESERVED_BYTES
        modes = layer_modes(config, geometry, mesh.pipeline_rank, available)
        planned = stage_memory(config, geometry, mesh.pipeline_rank, modes)
        parts = [f"{part.name} {getattr(planned, part.name) / _GIB:.1f}" for part in fields(planned)]
        raise LaunchError(
            f"rank {mesh.rank} is out of memory on {mesh.device}{_peak(mesh.device)}. Planned for it, in GiB: "
            f"{', '.join(parts)}. {_advice(config)}. ({str(error).splitlines()[0]})"
        ) from error


def _advice(config: RunConfig) -> str:
    train, options = config.train, []
    if train.activation_checkpointing != "full":
        options.append(f"set train.activation_checkpointing: full (it is {train.activation_checkpointing})")
    if train.micro_batch_size > 1:
        options.append(f"lower train.micro_batch_size (it is {train.micro_batch_size})")
    if train.precision == "bf16" and train.master_weights == "fp32":
        options.append("set train.master_weights: packed (it is fp32)")
    options.append(
        f"raise parallel.tensor ({config.parallel.tensor}) or parallel.pipeline ({config.parallel.pipeline})"
    )
    options.append(f"take more than {config.launch.nodes} nodes")
    text = "; or ".join(options)
    return text[0].upper() + text[1:]


def _peak(device: torch.device) -> str:
    if device.type != "cuda":
        return ""
    free, total = torch.cuda.mem_get_info(device)
    peak, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    return (
        f": at most {peak / _GIB:.1f} GiB in use and {reserved / _GIB:.1f} GiB reserved, {free / _GIB:.1f} GiB free "
        f"of {total / _GIB:.1f}"
    )


def _zero_batches(config: RunConfig) -> Batches:
    shape = (config.train.micro_batch_size, config.train.sequence_length)
    positions = np.broadcast_to(np.arange(shape[1]), shape).copy() if config.train.mask_documents else None
    sequences = np.zeros((shape[0], shape[1] + 1), dtype=np.int64)
    return pipeline_batches(itertools.repeat(sequences), None if positions is None else itertools.repeat(positions))
