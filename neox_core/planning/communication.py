"""What a rank sends and receives in one step, counted from the configuration.

Sizes are those of the whole tensor: what a reduction takes or a gathering gives.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from neox_core.config import ActivationCheckpointing, BatchGeometry, RunConfig
from neox_core.model.layer_groups import group_names
from neox_core.parallel.stages import defers
from neox_core.planning.activations import DTYPE_BYTES, micro_batch_tokens
from neox_core.planning.memory import copied_parameters, rank_parameters, replicated_parameters, vector_parameters

Collective = tuple[str, str]
"""(group's name, kind), such as ("tensor", "all-reduce")."""

_FP32, _FP64 = 4, 8


def step_traffic(
    config: RunConfig, geometry: BatchGeometry, stage: int, modes: Sequence[ActivationCheckpointing]
) -> Counter[Collective]:
    """Bytes of one step's collectives of each rank of a pipeline stage, by group and kind.

    Args:
        modes: activation checkpointing of each of its layers.
    """
    traffic: Counter[Collective] = Counter()
    if config.parallel.tensor > 1:
        traffic += _tensor_parallel(config, geometry, stage, modes)
    if config.parallel.pipeline > 1:
        traffic += _pipeline(config, geometry, stage)
    if geometry.data_parallel > 1:
        parameters, vectors = rank_parameters(config, stage), vector_parameters(config, stage)
        # Matrices by buckets, each to its owner and back; norms and biases at once.
        traffic["data", "reduce"] = _FP32 * (parameters - vectors)
        traffic["data", "reduce-scatter"] = _FP32 * vectors
        traffic["data", "broadcast"] = DTYPE_BYTES[config.train.precision] * (parameters - vectors)
        traffic["data", "all-gather"] = DTYPE_BYTES[config.train.precision] * vectors
    if geometry.world_size > 1:
        # The share of tokens that count, the loss, the squared norms of the gradient and of its groups.
        traffic["all", "all-reduce"] = _FP64 * (3 + len(group_names(config.model.num_layers)))
    return traffic


def _hidden(config: RunConfig) -> int:
    return DTYPE_BYTES[config.train.precision] * config.model.hidden_size * micro_batch_tokens(config)


def _tensor_parallel(
    config: RunConfig, geometry: BatchGeometry, stage: int, modes: Sequence[ActivationCheckpointing]
) -> Counter[Collective]:
    """Hidden states are summed after attention and MLP, their gradients before (arXiv 1909.08053).

    With sequence parallelism, a sum is a reduce-scatter and a gathering on the other side (arXiv 2205.05198), and
    selective checkpointing gathers the norms' results again. The embedding and the head add one sum each; norms over
    all heads, two numbers per token. Of the loss, all ranks get three numbers per token from each, and in fp32 again
    in the backward pass, which computes its chunks once more unless weights' gradients are deferred.
    """
    first, last = stage == 0, stage == config.parallel.pipeline - 1
    hidden, steps = _hidden(config), geometry.accumulation_steps
    sums = sum(layer_sums(config, mode) for mode in modes) + first + last
    again = config.train.precision == "fp32" and not defers(config, config.parallel.pipeline - 1)
    parts = last * (1 + again) * 3 * _FP32 * micro_batch_tokens(config) * config.parallel.tensor
    small = 0
    if config.model.differences.qk_norm == "projection":
        # Mean squares of queries and keys, which are computed again unless all is kept, and their gradients.
        small = sum(2 if mode == "none" else 3 for mode in modes) * 2 * _FP32 * micro_batch_tokens(config)
    if config.parallel.sequence:
        gathers = sum(4 if mode == "none" else 6 for mode in modes) + first + last
        return Counter(
            {
                ("tensor", "all-gather"): steps * (gathers * hidden + parts),
                ("tensor", "reduce-scatter"): steps * sums * hidden,
                ("tensor", "all-reduce"): steps * small
                + _FP32 * replicated_parameters(config, stage) // geometry.data_parallel,
            }
        )
    traffic = Counter({("tensor", "all-reduce"): steps * (sums * hidden + small)})
    if last:
        traffic["tensor", "all-gather"] = steps * parts
    # What DeepSpeed sends between stages is a part per rank, and put together again: inputs, results and gradients.
    if gathers := (not first) + 2 * (not last):
        traffic["tensor", "all-gather"] += steps * gathers * hidden
    return traffic


def layer_sums(config: RunConfig, mode: ActivationCheckpointing) -> int:
    """How often tensor-parallel ranks sum up hidden states or their gradients for a layer and a micro batch.

    Full checkpointing computes again what comes before a block's last product; norms after attention and MLP need that
    product's sum too.
    """
    return 4 + (1 + config.model.differences.norms_after) * (mode == "full")


def _pipeline(config: RunConfig, geometry: BatchGeometry, stage: int) -> Counter[Collective]:
    """Hidden states go to the next stage and gradients to the one before."""
    neighbours = (stage > 0) + (stage < config.parallel.pipeline - 1)
    size = geometry.accumulation_steps * neighbours * _hidden(config) // config.parallel.tensor
    traffic = Counter({("pipeline", "send"): size, ("pipeline", "receive"): size})
    # A tied head's gradient goes to the first stage, whose weight comes back.
    last = config.parallel.pipeline - 1
    if copied := copied_parameters(config, last) if stage in (0, last) else 0:
        sizes = (_FP32 * copied, DTYPE_BYTES[config.train.precision] * copied)
        traffic["pipeline", "send"] += sizes[stage == 0]
        traffic["pipeline", "receive"] += sizes[stage != 0]
    return traffic


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
