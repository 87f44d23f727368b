"""What a training job is given."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from neox_core.checkpoint.manifest import training_prefix
from neox_core.config import RunConfig
from neox_core.train.resuming.lineage import Ancestor

_CHECKPOINTS = "checkpoints"


def local_checkpoints(config: RunConfig, output: Path) -> Path:
    """Folder of checkpoints on their way to and from the store: in the training's own, or on each node's disk.

    Args:
        output: the training's own folder.
    """
    scratch = config.launch.scratch
    return (output if scratch is None else scratch / output.name) / _CHECKPOINTS


@dataclass(frozen=True)
class TrainJob:
    """What one training job reads and writes."""

    data: Path
    """Folder of token datasets, as prepare-data makes it."""
    weights: Path
    """Folder of NeoX shards, as convert makes it."""
    output: Path
    """Folder for metrics and local checkpoint files."""
    fingerprint: str
    """Identity of the training; checkpoints of another one are never resumed, but for its ancestors."""
    ancestors: tuple[Ancestor, ...] = ()
    """The trainings that it was before changes of weights, learning rate, batch size or length."""

    @property
    def prefix(self) -> str:
        """Key of this training's checkpoints in the store."""
        return training_prefix(self.fingerprint)
