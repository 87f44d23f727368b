"""DeepSpeed's files of a rank's state: who takes them, and what they are called."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointCommitInfo, CheckpointEngine
from deepspeed.utils.tensor_fragment import fragment_address

from neox_core.checkpoint.partitions import Place
from neox_core.checkpoint.writer import TakeFile
from neox_core.errors import CheckpointError

_OPTIMIZER = "optim_states"


class StateFiles(CheckpointEngine):  # type: ignore[misc]
    """DeepSpeed's checkpoint engine that hands each file on.

    Args:
        take: where files go.
        stream: what it is called in; None: the current one. DeepSpeed's barriers stay in the current one, so that they
            do not wait for copies.
    """

    def __init__(self, take: TakeFile, stream: torch.cuda.Stream | None = None) -> None:
        super().__init__()
        self._take, self._stream = take, stream

    def create(self, info: CheckpointCommitInfo) -> None:
        """Nothing to prepare."""

    def save(self, state_dict: Any, path: str) -> None:
        """Hand on one file."""
        with torch.cuda.stream(self._stream):
            self._take(state_dict, Path(path))

    def commit(self, info: CheckpointCommitInfo) -> bool:
        """Nothing: whoever takes the files knows when they are complete."""
        return True

    def load(self, path: str, map_location: Any = None) -> Any:
        """Read one file."""
        return read_state(Path(path), map_location)

    def preserves_storage_sharing(self) -> bool:
        """False: copies share no storage, so DeepSpeed need not clone."""
        return False


def read_state(path: Path, map_location: Any = "cpu", mmap: bool = False) -> Any:
    """A file of a rank's state: tensors, plain values, and where parameters lie; never code, whatever the pickle says.

    Args:
        mmap: leave tensors on disk until they are used.

    Raises:
        CheckpointError: it holds something else, or is damaged.
    """
    try:
        with torch.serialization.safe_globals([fragment_address]):
            return torch.load(path, map_location=map_location, mmap=mmap, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).split("\n", 1)[0][:200]
        raise CheckpointError(
            f"{path} is not loaded, since it holds more than tensors and plain values, or is damaged ({reason}): such "
            "a file is none of this software's; look where it comes from"
        ) from None


def is_shared_file(name: str) -> bool:
    """Whether it holds weights or counters, which ranks have in common."""
    return _OPTIMIZER not in name


def is_own_file(name: str, place: Place, tensor_size: int) -> bool:
    """Whether it holds a rank's share of the optimizer's state."""
    # DeepSpeed's `mp_rank`: the index among ranks that share a data-parallel rank.
    model_rank = place.stage * tensor_size + place.tensor_rank
    return name.endswith(f"zero_pp_rank_{place.data_rank}_mp_rank_{model_rank:02d}_{_OPTIMIZER}.pt")
