"""How long the exchanges of a step take, and how much of that nothing hides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from neox_core.config import ActivationCheckpointing, BatchGeometry, RunConfig
from neox_core.parallel.overlap.symmetric import groups
from neox_core.planning.activations import DTYPE_BYTES, micro_batch_tokens
from neox_core.planning.communication import layer_sums
from neox_core.planning.hardware import Hardware
from neox_core.planning.memory import rank_parameters
from neox_core.planning.work import ELEMENTWISE_SHARE

SKEW = 1.25
"""Exchanges within a step, in the time of such exchanges alone: ranks come to them at different times."""
_BARRIER = 2.0
"""Of a barrier before an exchange by copy engines, in latencies of the link."""
_BUCKET_BYTES = 128 * 2**20
_FP32 = 4


@dataclass(frozen=True)
class ExchangeTime:
    """Seconds in which nothing runs alongside an exchange, and in which something does."""

    exposed: float
    hidden: float = 0.0


def tensor_exchange(
    config: RunConfig,
    geometry: BatchGeometry,
    hardware: Hardware,
    stage: int,
    modes: Sequence[ActivationCheckpointing],
    products: float,
) -> ExchangeTime:
    """A micro batch's exchanges of hidden states between tensor-parallel ranks, as communication.py counts them.

    Without sequence parallelism, a sum is an all-reduce, twice what a gathering sends. Exchanges by copy engines run
    alongside products, but for their barriers and copies.

    Args:
        products: seconds of a layer's forward products, which four exchanges share.
    """
    ranks = config.parallel.tensor
    if ranks == 1:
        return ExchangeTime(0.0)
    ends = (stage == 0) + (stage == config.parallel.pipeline - 1)
    within = sum(layer_sums(config, mode) for mode in modes)
    sums, gathers = within + ends, sum(4 if mode == "none" else 6 for mode in modes) + ends
    if not config.parallel.sequence:
        sums, gathers = 2 * sums, 0
    sent = hidden_bytes(config) * (ranks - 1) / ranks
    each = _collective(hardware, sent, _across(geometry, config, span=ranks, groups=1))
    if not overlaps(config):
        return ExchangeTime(SKEW * (sums + gathers) * each)
    gathered = sum(6 if mode == "full" else 4 for mode in modes)  # selective's gathering again is not overlapped
    overlapped = within + gathered
    late = late_seconds(each, products / 4, ranks, micro_batch_tokens(config) // ranks)
    hidden = each - late
    waiting = _BARRIER * hardware.link.seconds(0) + late
    moved = copies(config, hardware, gathered) + additions(config, hardware, within, backward=2 * len(modes))
    exposed = SKEW * (sums + gathers - overlapped) * each + overlapped * waiting + moved
    return ExchangeTime(exposed, overlapped * hidden)


def late_seconds(exchange: float, product: float, ranks: int, rows: int) -> float:
    """Seconds that a product of gathered rows waits for them, or the next one for the rows of a sum.

    Peers' rows come and go in groups, a peer's own `rows` by themselves where they are many. A first group comes while
    this rank's own are multiplied; the last to come has all but its own product to hide behind.
    """
    peers, together = ranks - 1, len(groups(range(1, ranks), rows)[0])
    first = exchange * together / peers - product / ranks
    last = exchange - product * (ranks - together) / ranks
    return max(0.0, first, last)


def copies(config: RunConfig, hardware: Hardware, gathers: int) -> float:
    """Seconds in which a rank's own rows are copied to where the others fetch them and to all rows: read once."""
    return 3 * gathers * hidden_bytes(config) / config.parallel.tensor / hardware.memory


def additions(config: RunConfig, hardware: Hardware, sums: int, backward: int) -> float:
    """Seconds in which what other ranks sent is added to a rank's own product, by a pass that is there anyway.

    The next sum with its norm reads the others'. In the backward pass the product reads their sum, which is made before
    if there is more than one: all of them read, one written. A norm after attention or MLP takes no sum along: forward,
    a pass of its own reads one more and writes one.
    """
    ranks = config.parallel.tensor
    tensors = (ranks - 1) * (sums - backward) + (1 if ranks == 2 else 1 + ranks) * backward
    if config.model.differences.norms_after:
        tensors += 2 * (sums - backward)
    return tensors * hidden_bytes(config) / ranks / (ELEMENTWISE_SHARE * hardware.memory)


def overlaps(config: RunConfig) -> bool:
    """Tensor-parallel ranks' exchanges run alongside a layer's products."""
    parallel = config.parallel
    share_a_host = parallel.tensor > 1 and config.launch.ranks_per_node % parallel.tensor == 0
    return parallel.overlap == "auto" and parallel.sequence and share_a_host


def stage_exchange(config: RunConfig, geometry: BatchGeometry, hardware: Hardware) -> ExchangeTime:
    """A micro batch's hidden states from the stage before, and their gradients back to it: computation waits."""
    if config.parallel.pipeline == 1:
        return ExchangeTime(0.0)
    sent = hidden_bytes(config) / config.parallel.tensor
    across = geometry.data_parallel * config.parallel.tensor >= config.launch.ranks_per_node
    shared = sent * config.launch.ranks_per_node / hardware.network + hardware.network_latency
    return ExchangeTime(2 * SKEW * (shared if across else hardware.link.seconds(sent)))


def data_exchange(
    config: RunConfig, geometry: BatchGeometry, hardware: Hardware, stage: int, backward: float, forward: float
) -> ExchangeTime:
    """A step's reduction of gradients and gathering of parameters, during the last backward and the next forward pass
    but for a bucket each.

    Args:
        backward: seconds in which a step's last micro batch completes the gradients.
        forward: those of a micro batch's forward pass.
    """
    ranks = geometry.data_parallel
    if ranks == 1:
        return ExchangeTime(0.0)
    parameters = rank_parameters(config, stage) * (ranks - 1) / ranks
    across = _across(geometry, config, span=ranks * config.parallel.tensor, groups=config.parallel.tensor)
    reduction = _collective(hardware, _FP32 * parameters, across)
    bucket = _collective(hardware, min(_BUCKET_BYTES, _FP32 * parameters), across)
    gathering = _collective(hardware, DTYPE_BYTES[config.train.precision] * parameters, across)
    hidden = min(reduction - bucket, backward) + min(max(0.0, gathering - bucket), forward)
    return ExchangeTime(SKEW * (reduction + gathering - hidden), hidden)


def hidden_bytes(config: RunConfig) -> int:
    """Bytes of a micro batch's hidden states."""
    return DTYPE_BYTES[config.train.precision] * config.model.hidden_size * micro_batch_tokens(config)


def _across(geometry: BatchGeometry, config: RunConfig, span: int, groups: int) -> int:
    """How many groups share a node's network when ranks that lie `span` apart exchange; 0: they are on one node."""
    node = config.launch.ranks_per_node
    # Ranks whose number does not divide a node's are on two nodes in places.
    return 0 if node % span == 0 or geometry.world_size <= node else min(groups, node)


def _collective(hardware: Hardware, sent: float, groups_across: int) -> float:
    """Seconds in which each rank sends so many bytes around a ring, which the slowest link holds up."""
    within = hardware.link.seconds(sent)
    if not groups_across:
        return within
    return max(within, sent * groups_across / hardware.network + hardware.network_latency)
