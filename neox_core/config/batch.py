"""Batch geometry: the batch in tokens is fixed, gradient accumulation follows from the number of ranks."""

from __future__ import annotations

from dataclasses import dataclass

from neox_core.config.schema import RunConfig
from neox_core.errors import ConfigError


@dataclass(frozen=True)
class BatchGeometry:
    """How one global batch is cut among ranks."""

    world_size: int
    data_parallel: int
    micro_batch_size: int
    accumulation_steps: int
    sequences: int
    """Sequences of a global batch over all ranks."""
    tokens: int
    """Tokens of a global batch over all ranks."""


def batch_geometry(config: RunConfig, nodes: int | None = None) -> BatchGeometry:
    """Cut the global batch for a number of nodes (default: launch.nodes).

    Raises:
        ConfigError: TP x PP does not divide the world size, or the ranks do not divide the batch; the message
            names the numbers of nodes that do.
    """
    nodes = nodes or config.launch.nodes
    geometry = _try_geometry(config, nodes)
    if isinstance(geometry, str):
        fits = [n for n in range(1, max(64, 2 * nodes) + 1) if not isinstance(_try_geometry(config, n), str)]
        advice = f"numbers of nodes that work: {', '.join(map(str, fits))}" if fits else _no_nodes_advice(config)
        raise ConfigError(f"{geometry}; {advice}")
    return geometry


def _try_geometry(config: RunConfig, nodes: int) -> BatchGeometry | str:
    """The geometry, or what stands in its way."""
    world = nodes * config.launch.ranks_per_node
    tensor, pipeline = config.parallel.tensor, config.parallel.pipeline
    if world % (tensor * pipeline):
        return (
            f"{nodes} nodes x {config.launch.ranks_per_node} ranks = world size {world}, which parallel.tensor "
            f"{tensor} x parallel.pipeline {pipeline} = {tensor * pipeline} does not divide"
        )
    data_parallel = world // (tensor * pipeline)
    sequences = config.train.global_batch_tokens // config.train.sequence_length
    per_pass = data_parallel * config.train.micro_batch_size
    if sequences % per_pass:
        return (
            f"a global batch of {sequences} sequences ({config.train.global_batch_tokens} tokens) is not divisible by "
            f"{data_parallel} data-parallel ranks x micro batch {config.train.micro_batch_size} on {nodes} nodes"
        )
    return BatchGeometry(
        world_size=world,
        data_parallel=data_parallel,
        micro_batch_size=config.train.micro_batch_size,
        accumulation_steps=sequences // per_pass,
        sequences=sequences,
        tokens=sequences * config.train.sequence_length,
    )


def _no_nodes_advice(config: RunConfig) -> str:
    return (
        f"no number of nodes works with launch.ranks_per_node {config.launch.ranks_per_node}: change it, "
        "parallel.tensor, parallel.pipeline or train.micro_batch_size"
    )
