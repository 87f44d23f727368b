"""What saves need outside the GPUs: host memory, local disk and the bucket."""

from __future__ import annotations

from dataclasses import dataclass

from neox_core.config import BatchGeometry, RunConfig
from neox_core.optimizer import update_rule
from neox_core.optimizer.rule import STATE_BYTES
from neox_core.planning.activations import DTYPE_BYTES
from neox_core.planning.memory import rank_parameters
from neox_core.units import format_bytes

_FP32 = 4
_LOCAL_COPIES = 3
"""Two that the store has, for a quick resume, and the one that is being written."""


@dataclass(frozen=True)
class CheckpointNeeds:
    """Bytes, but for `count`."""

    checkpoint: int
    """All files of one."""
    host_memory: int
    """On a node, at most: its ranks' copies of what they save."""
    local_disk: int
    """On all nodes together; while the store fails, two checkpoints more."""
    count: int
    """Checkpoints in the bucket at the end of the run, at most."""

    def rows(self) -> list[tuple[str, str]]:
        """As (what, value with unit)."""
        return [
            ("checkpoint", format_bytes(self.checkpoint)),
            ("host memory per node for saves", format_bytes(self.host_memory)),
            ("local disk of all nodes for saves", format_bytes(self.local_disk)),
            ("bucket at the end", f"{self.count:,} checkpoints = {format_bytes(self.count * self.checkpoint)}"),
        ]


def checkpoint_needs(config: RunConfig, batch: BatchGeometry) -> CheckpointNeeds:
    """Work out what the run's saves need.

    The first data-parallel ranks save weights; all save their share of fp32 master weights and of the rule's state.
    """
    weight = DTYPE_BYTES[config.train.precision]
    share = _FP32 + STATE_BYTES * len(update_rule(config.train.optimizer).state_names)
    parameters = [rank_parameters(config, stage) for stage in range(config.parallel.pipeline)]
    whole = config.parallel.tensor * sum(parameters) * (weight + share)
    rank = max(parameters) * weight + -(-max(parameters) // batch.data_parallel) * share
    ranks = min(config.launch.ranks_per_node, batch.world_size)
    return CheckpointNeeds(whole, min(ranks * rank, whole), _LOCAL_COPIES * whole, _kept(config))


def _kept(config: RunConfig) -> int:
    steps, keep = config.train.steps, config.checkpoints
    interval = config.train.checkpoint_interval
    made = {*range(interval, steps, interval), steps}
    if keep.keep_last is None:
        return len(made)
    often = [step for step in made if keep.keep_every and step % keep.keep_every == 0]
    return min(len(made), keep.keep_last + len(often) + keep.keep_best)
