"""How long a step takes, from the work of each pipeline stage and the figures of the hardware."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

from neox_core.config import ActivationCheckpointing, BatchGeometry, RunConfig, batch_geometry, largest_batch
from neox_core.parallel.stages import defers
from neox_core.planning.activation_checkpointing import layer_modes
from neox_core.planning.activations import DTYPE_BYTES, micro_batch_tokens
from neox_core.planning.exchange_time import data_exchange, overlaps, stage_exchange, tensor_exchange
from neox_core.planning.hardware import Hardware
from neox_core.planning.memory import memory_limit, rank_dimensions, rank_parameters
from neox_core.planning.plan import flops_per_token
from neox_core.planning.work import head_time, layer_time

GAPS = 0.005
"""Share of a micro batch in which a GPU does nothing although nothing keeps it: 0.3 to 0.7% measured on an H200."""
SHARED_POWER = 0.03
"""By which a layer's products take longer when exchanges run alongside them: a power-capped card gives them less.

Of TP 2 on H200s, 5% with the 7B's micro batch 2, 1% with 8, 2% with the 34B's 4: one figure between them for all.
"""
_OPTIMIZER_BYTES = 32
"""Read and written for each of a rank's own parameters by the update, its gradient cleared; 4 more for the norm."""
_HOST_MODE = {"none": 1.0, "selective": 1.4, "full": 1.7}
"""Python of a layer that is computed again, in that of one which is not."""
_HOST_ALONE = 0.5
"""Python of a layer on one tensor-parallel rank, in that of one whose ranks exchange tokens."""
_HOST_LAG = 0.2
"""By which the slowest of twice as many ranks of a host, for which the others wait, is slower."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step, by part, on the pipeline stage that all wait for."""

    products: float
    attention: float
    elementwise: float
    recomputation: float
    tensor_exchange: float
    """Of hidden states between tensor-parallel ranks, where nothing else runs at the same time."""
    pipeline_exchange: float
    """Of hidden states with the neighbouring stages."""
    data_exchange: float
    """Of gradients and parameters among data-parallel ranks, where nothing else runs at the same time."""
    bubble: float
    """A stage waits for its first micro batch and after its last one (arXiv 1811.06965), unless it adds weights'
    gradients meanwhile (arXiv 2401.10241)."""
    optimizer: float
    host: float
    """The GPU waits for Python: only without CUDA graphs."""
    gaps: float

    @property
    def total(self) -> float:
        """The whole step."""
        return sum(getattr(self, part.name) for part in fields(self))


@dataclass(frozen=True)
class Prediction:
    """A step's time, and what else of it one asks for."""

    time: StepTime
    hidden: float
    """Seconds of exchanges that run alongside computation."""
    tokens_per_second_per_gpu: float

    def utilisation(self, config: RunConfig, hardware: Hardware) -> float:
        """Model FLOPs (full attention) per second and GPU, of the peak."""
        flops = flops_per_token(config.model, config.train.sequence_length)
        return self.tokens_per_second_per_gpu * flops / hardware.peak

    def rows(self) -> list[tuple[str, str]]:
        """The parts as (what, seconds and share), those that take time."""
        total = self.time.total
        parts = [(part.name.replace("_", " "), getattr(self.time, part.name)) for part in fields(self.time)]
        rows = [(name, f"{seconds:.3f} s, {seconds / total:.1%}") for name, seconds in parts if seconds]
        return [
            *rows,
            ("step", f"{total:.3f} s = {self.tokens_per_second_per_gpu:,.0f} tokens/s on each GPU"),
            ("exchanges alongside computation", f"{self.hidden:.3f} s more"),
        ]


def predict_run(config: RunConfig, hardware: Hardware, nodes: int | None = None) -> Prediction:
    """Predict a run's first steps on a number of nodes (default: launch.nodes), with what its largest batch computes
    again.

    Raises:
        ConfigError: the nodes don't divide the batch.
    """
    available = memory_limit(config, hardware.memory_gib * 2**30)
    largest = largest_batch(config, nodes)
    modes = [layer_modes(config, largest, stage, available) for stage in range(config.parallel.pipeline)]
    return predict(config, batch_geometry(config, nodes), hardware, modes)


def predict(
    config: RunConfig,
    geometry: BatchGeometry,
    hardware: Hardware,
    modes: Sequence[Sequence[ActivationCheckpointing]],
) -> Prediction:
    """Predict a step's time.

    Args:
        modes: activation checkpointing of each layer of each stage, see `layer_modes`.
    """
    count = geometry.accumulation_steps
    stages = [_micro_batch(config, geometry, hardware, stage, own) for stage, own in enumerate(modes)]
    totals = [_total(parts) for parts, _ in stages]
    slowest = max(range(len(stages)), key=totals.__getitem__)
    parts, hidden = stages[slowest]
    computing = sum(parts[name] for name in ("products", "attention", "elementwise", "recomputation"))
    deferred = [_weights(config, hardware, len(own)) for stage, own in enumerate(modes) if defers(config, stage)]
    # The last backward pass, two thirds of a micro batch, hides the reduction; where weights' gradients are deferred,
    # these alone do, on the stage that has the least.
    backward = min(deferred, default=computing * 2 / 3)
    filled = times_filled(len(stages), count) * min(deferred, default=0.0)
    data = data_exchange(config, geometry, hardware, slowest, backward, computing / 3)
    time = StepTime(
        **{name: count * seconds for name, seconds in parts.items()},
        data_exchange=data.exposed,
        bubble=max(0.0, sum(totals) - totals[slowest] - filled),
        optimizer=_optimizer(config, geometry, hardware, slowest),
    )
    rate = geometry.tokens / time.total / geometry.world_size
    return Prediction(time, count * hidden + data.hidden, rate)


def times_filled(stages: int, count: int) -> int:
    """How many times less than in 1F1B a step of `count` micro batches waits for one's weight gradients, in ZB-H1.

    For each other stage once as the step ends, and once as it begins, where there are as many micro batches to defer.
    """
    return stages - 1 + min(count, stages) - 1


def _total(parts: dict[str, float]) -> float:
    return sum(parts.values())


def _weights(config: RunConfig, hardware: Hardware, layers: int) -> float:
    """Seconds of a stage's weight gradients for a micro batch; the head's come with the loss."""
    products = layer_time(config, rank_dimensions(config), "none", hardware).products
    return micro_batch_tokens(config) * layers * products / 3


def _micro_batch(
    config: RunConfig,
    geometry: BatchGeometry,
    hardware: Hardware,
    stage: int,
    modes: Sequence[ActivationCheckpointing],
) -> tuple[dict[str, float], float]:
    """Seconds of a stage's micro batch, forward and backward, by part; and of exchanges alongside computation."""
    dims, tokens = rank_dimensions(config), micro_batch_tokens(config)
    last = stage == config.parallel.pipeline - 1
    layers = [layer_time(config, dims, mode, hardware) for mode in modes]
    forward = tokens * layers[0].products / 3
    between = tensor_exchange(config, geometry, hardware, stage, modes, forward)
    sent = stage_exchange(config, geometry, hardware)
    parts = {
        name: tokens * sum(getattr(layer, name) for layer in layers)
        for name in ("products", "attention", "elementwise", "recomputation")
    }
    parts["products"] *= 1 + SHARED_POWER * overlaps(config)
    parts["products"] += tokens * head_time(dims, hardware) * last
    parts |= {"tensor_exchange": between.exposed, "pipeline_exchange": sent.exposed}
    parts["gaps"] = GAPS * _total(parts)
    parts["host"] = max(0.0, _host(config, geometry, hardware, modes) - _total(parts))
    return parts, between.hidden + sent.hidden


def _host(
    config: RunConfig, geometry: BatchGeometry, hardware: Hardware, modes: Sequence[ActivationCheckpointing]
) -> float:
    """Python's seconds for a micro batch on the slowest rank; with graphs, too few to count."""
    if config.train.cuda_graphs == "auto":
        return 0.0
    layer = hardware.host_layer * (_HOST_ALONE if config.parallel.tensor == 1 else 1.0)
    together = min(geometry.world_size, config.launch.ranks_per_node)
    waiting = 1 + _HOST_LAG * max(0.0, math.log2(together / 2)) if config.parallel.tensor > 1 else 1.0
    return waiting * (hardware.host_micro_batch + layer * sum(_HOST_MODE[mode] for mode in modes))


def _optimizer(config: RunConfig, geometry: BatchGeometry, hardware: Hardware, stage: int) -> float:
    """The norm, the update of a rank's own parameters, and the clearing of all gradients, at a copy's bandwidth."""
    parameters = rank_parameters(config, stage)
    own = parameters / geometry.data_parallel
    moved = (_OPTIMIZER_BYTES + 4) * own + 4 * (parameters - own)
    return moved * DTYPE_BYTES[config.train.precision] / 2 / hardware.memory
