"""Batch geometry: the batch in tokens is fixed, gradient accumulation follows from the number of ranks."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from neox_core.config.schema import RunConfig
from neox_core.config.train_sections import TrainConfig
from neox_core.errors import ConfigError

_ADVISED = 8


@dataclass(frozen=True)
class BatchGeometry:
    """How one global batch is cut among ranks."""

    world_size: int
    data_parallel: int
    micro_batch_size: int
    accumulation_steps: int
    """Micro batches of each data-parallel rank; where they cannot have the same number, of those that have one more."""
    sequences: int
    """Sequences of a global batch over all ranks."""
    tokens: int
    """Tokens of a global batch over all ranks."""

    def micro_batches_of(self, data_rank: int) -> int:
        """Micro batches of a data-parallel rank: they are dealt in turn, so that the first ranks may have one more."""
        each, more = divmod(self.sequences // self.micro_batch_size, self.data_parallel)
        return each + (data_rank < more)

    @property
    def busy(self) -> float:
        """Share of a step in which data-parallel ranks compute on average: 1 where all have as many micro batches."""
        return self.sequences / (self.accumulation_steps * self.micro_batch_size * self.data_parallel)


def batch_geometry(config: RunConfig, nodes: int | None = None, step: int = 1) -> BatchGeometry:
    """Cut a step's global batch for a number of nodes (default: launch.nodes).

    Raises:
        ConfigError: TP x PP does not divide the world size, or some step's batch is not made of whole micro batches, at
            least one for each data-parallel rank; the message names the numbers of nodes that do.
    """
    nodes = nodes or config.launch.nodes
    if problem := _problem(config, nodes):
        fits = [n for n in range(1, min(max(64, 2 * nodes), _most_nodes(config)) + 1) if not _problem(config, n)]
        nearest = sorted(sorted(fits, key=lambda n: abs(n - nodes))[:_ADVISED])
        advice = f"numbers of nodes that work: {', '.join(map(str, nearest))}" if fits else _no_nodes_advice(config)
        raise ConfigError(f"{problem}; {advice}")
    geometry = _try_geometry(config, nodes, batch_tokens(config.train, step))
    assert isinstance(geometry, BatchGeometry), "a batch of the run"
    return geometry


def largest_batch(config: RunConfig, nodes: int | None = None) -> BatchGeometry:
    """The geometry of the run's largest global batch, which needs the most memory: it has the most in a pipeline.

    Raises:
        ConfigError: as `batch_geometry`.
    """
    step, _ = max(_batches(config.train), key=lambda batch: batch[1])
    return batch_geometry(config, nodes, step)


def batch_tokens(train: TrainConfig, step: int) -> int:
    """Tokens of a step's global batch."""
    return next(tokens for first, tokens in reversed(_batches(train)) if first <= step)


def sequences_before(train: TrainConfig, step: int) -> int:
    """Sequences that the steps before this one take."""
    bounds = [*_batches(train), (step, 0)]
    spans = ((first, min(end, step), size) for (first, size), (end, _) in pairwise(bounds) if first < step)
    tokens = sum((end - first) * size for first, end, size in spans)
    return tokens // train.sequence_length


def _batches(train: TrainConfig) -> list[tuple[int, int]]:
    """First step of each batch size, and the batch's tokens."""
    changes = [(change.from_step, change.global_batch_tokens) for change in train.changes]
    return [(1, train.global_batch_tokens), *((step, tokens) for step, tokens in changes if tokens)]


def _problem(config: RunConfig, nodes: int) -> str | None:
    """What stands in the way of some step's batch."""
    found = [_try_geometry(config, nodes, tokens) for _, tokens in _batches(config.train)]
    return next((problem for problem in found if isinstance(problem, str)), None)


def _most_nodes(config: RunConfig) -> int:
    """Above so many, the smallest batch has no micro batch for each data-parallel rank."""
    smallest = min(tokens for _, tokens in _batches(config.train))
    micro_batches = smallest // config.train.sequence_length // config.train.micro_batch_size
    return micro_batches * config.parallel.tensor * config.parallel.pipeline // config.launch.ranks_per_node


def _try_geometry(config: RunConfig, nodes: int, tokens: int) -> BatchGeometry | str:
    """The geometry of a batch, or what stands in its way."""
    world = nodes * config.launch.ranks_per_node
    tensor, pipeline = config.parallel.tensor, config.parallel.pipeline
    if world % (tensor * pipeline):
        return (
            f"{nodes} nodes x {config.launch.ranks_per_node} ranks = world size {world}, which parallel.tensor "
            f"{tensor} x parallel.pipeline {pipeline} = {tensor * pipeline} does not divide"
        )
    data_parallel = world // (tensor * pipeline)
    sequences = tokens // config.train.sequence_length
    micro_batches, rest = divmod(sequences, config.train.micro_batch_size)
    if rest:
        return (
            f"a global batch of {sequences} sequences ({tokens} tokens) is not divisible by micro batch "
            f"{config.train.micro_batch_size}"
        )
    if micro_batches < data_parallel:
        return (
            f"a global batch of {sequences} sequences ({tokens} tokens) is {micro_batches} micro batches of "
            f"{config.train.micro_batch_size}, too few for {data_parallel} data-parallel ranks on {nodes} nodes"
        )
    return BatchGeometry(
        world_size=world,
        data_parallel=data_parallel,
        micro_batch_size=config.train.micro_batch_size,
        accumulation_steps=-(-micro_batches // data_parallel),
        sequences=sequences,
        tokens=sequences * config.train.sequence_length,
    )


def _no_nodes_advice(config: RunConfig) -> str:
    return (
        f"no number of nodes works with launch.ranks_per_node {config.launch.ranks_per_node}: change it, "
        "parallel.tensor, parallel.pipeline or train.micro_batch_size"
    )
