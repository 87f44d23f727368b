"""What a rank sends and receives in one step, counted from the configuration.

Sizes are those of the whole tensor: what a reduction takes or a gathering gives.
"""

from __future__ import annotations

from collections import Counter

from neox_core.activations import DTYPE_BYTES, micro_batch_tokens
from neox_core.config import BatchGeometry, RunConfig
from neox_core.memory import rank_parameters, stage_layers

Collective = tuple[str, str]
"""(group's name, kind), such as ("tensor", "all-reduce")."""

_FP32 = 4


def step_traffic(config: RunConfig, geometry: BatchGeometry, stage: int) -> Counter[Collective]:
    """Bytes of one step's collectives of each rank of a pipeline stage, by group and kind."""
    traffic: Counter[Collective] = Counter()
    if config.parallel.tensor > 1:
        traffic += _tensor_parallel(config, geometry, stage)
    if config.parallel.pipeline > 1:
        traffic += _pipeline(config, geometry, stage)
    if geometry.data_parallel > 1:
        parameters = rank_parameters(config, stage)
        traffic["data", "reduce-scatter"] = _FP32 * parameters
        traffic["data", "all-gather"] = DTYPE_BYTES[config.train.precision] * parameters
    if geometry.world_size > 1:
        traffic["all", "all-reduce"] = _FP32  # the norm's square
    return traffic


def _hidden(config: RunConfig) -> int:
    return DTYPE_BYTES[config.train.precision] * config.model.hidden_size * micro_batch_tokens(config)


def _tensor_parallel(config: RunConfig, geometry: BatchGeometry, stage: int) -> Counter[Collective]:
    """Hidden states are summed after attention and MLP, their gradients before (arXiv 1909.08053).

    Full checkpointing sums after attention once more. The embedding and the head add one sum each; the loss, a
    maximum and two sums per token.
    """
    first, last = stage == 0, stage == config.parallel.pipeline - 1
    full = config.train.activation_checkpointing == "full"
    sums = stage_layers(config, stage) * (5 if full else 4) + first + last
    loss = last * 3 * _FP32 * micro_batch_tokens(config)
    steps = geometry.accumulation_steps
    traffic = Counter({("tensor", "all-reduce"): steps * (sums * _hidden(config) + loss)})
    # What DeepSpeed sends between stages is a part per rank, and put together again: inputs, results and gradients.
    if gathers := (not first) + 2 * (not last):
        traffic["tensor", "all-gather"] = steps * gathers * _hidden(config)
    return traffic


def _pipeline(config: RunConfig, geometry: BatchGeometry, stage: int) -> Counter[Collective]:
    """Hidden states go to the next stage and gradients to the one before."""
    neighbours = (stage > 0) + (stage < config.parallel.pipeline - 1)
    size = geometry.accumulation_steps * neighbours * _hidden(config) // config.parallel.tensor
    return Counter({("pipeline", "send"): size, ("pipeline", "receive"): size})


def sent_bytes(collective: Collective, size: int, ranks: int) -> int:
    """What a rank sends for a tensor of `size` bytes among `ranks`, by rings (an all-reduce is two passes)."""
    kind = collective[1]
    if kind in ("send", "receive"):
        return size if kind == "send" else 0
    return size * (ranks - 1) // ranks * (2 if kind == "all-reduce" else 1)


def group_size(collective: Collective, config: RunConfig, geometry: BatchGeometry) -> int:
    """Ranks of a collective's group."""
    sizes = {"tensor": config.parallel.tensor, "data": geometry.data_parallel, "pipeline": config.parallel.pipeline}
    return sizes.get(collective[0], geometry.world_size)
