"""DeepSpeed's files of a rank's state: who takes them, and what they are called."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointCommitInfo, CheckpointEngine

from neox_core.checkpoint.partitions import Place
from neox_core.checkpoint.writer import TakeFile

_OPTIMIZER = "optim_states"


class StateFiles(CheckpointEngine):  # type: ignore[misc]
    """DeepSpeed's checkpoint engine that hands each file on.

    Args:
        take: where files go.
    """

    def __init__(self, take: TakeFile) -> None:
        super().__init__()
        self._take = take

    def create(self, info: CheckpointCommitInfo) -> None:
        """Nothing to prepare."""

    def save(self, state_dict: Any, path: str) -> None:
        """Hand on one file."""
        self._take(state_dict, Path(path))

    def commit(self, info: CheckpointCommitInfo) -> bool:
        """Nothing: whoever takes the files knows when they are complete."""
        return True

    def load(self, path: str, map_location: Any = None) -> Any:
        """Read one file that this software wrote and whose checksum was verified."""
        return torch.load(path, map_location=map_location, weights_only=False)

    def preserves_storage_sharing(self) -> bool:
        """False: copies share no storage, so DeepSpeed need not clone."""
        return False


def is_shared_file(name: str) -> bool:
    """Whether it holds weights or counters, which ranks have in common."""
    return _OPTIMIZER not in name


def is_own_file(name: str, place: Place, tensor_size: int) -> bool:
    """Whether it holds a rank's share of the optimizer's state."""
    # DeepSpeed's `mp_rank`: the index among ranks that share a data-parallel rank.
    model_rank = place.stage * tensor_size + place.tensor_rank
    return name.endswith(f"zero_pp_rank_{place.data_rank}_mp_rank_{model_rank:02d}_{_OPTIMIZER}.pt")
