"""The optimizer's state from the files of ranks of another layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from deepspeed.utils.tensor_fragment import fragment_address
from torch import Tensor

from neox_core.checkpoint.partitions import Place
from neox_core.checkpoint.resharding import Resharding
from neox_core.errors import CheckpointError
from neox_core.train.engine.sharded_optimizer import ShardedOptimizer
from neox_core.train.engine.state.files import is_own_file, read_state


class OptimizerFiles:
    """Optimizer's files of any ranks, whose tensors stay on disk until they are used.

    Args:
        folder: of one checkpoint.
        resharding: from the layout of those who wrote them.
    """

    def __init__(self, folder: Path, resharding: Resharding) -> None:
        self._folder, self._resharding = folder, resharding
        self._opened: dict[Place, Any] = {}

    def masters(self, place: Place, group: int) -> Tensor:
        """A rank's part of a flat group of fp32 master weights."""
        return cast(Tensor, self._open(place)["single_partition_of_fp32_groups"][group])

    def state(self, place: Place, group: int, name: str) -> Tensor:
        """A tensor of the state that the update rule keeps, of a rank's part of a flat group."""
        return cast(Tensor, self._open(place)["base_optimizer_state"]["state"][group][name])

    def _open(self, place: Place) -> Any:
        if place not in self._opened:
            paths = [p for p in self._folder.iterdir() if is_own_file(p.name, place, self._resharding.saved.tensor)]
            if len(paths) != 1:
                raise CheckpointError(f"{self._folder} has {len(paths)} optimizer's files of {place} instead of one")
            state = read_state(paths[0], mmap=True)["optimizer_state_dict"]
            self._check(paths[0], place, state["param_slice_mappings"])
            self._opened[place] = state
        return self._opened[place]

    def _check(self, path: Path, place: Place, slices: Sequence[Mapping[str, fragment_address]]) -> None:
        """Compare where the file says that its parameters lie with where they are read."""
        expected = self._resharding.saved_elements(place)
        found = [{name: range(slot.start, slot.start + slot.numel) for name, slot in group.items()} for group in slices]
        if found != expected:
            raise CheckpointError(f"{path} has {found}, but {self._resharding.saved} puts {expected} there")


@torch.no_grad()
def load_resharded(optimizer: ShardedOptimizer, files: OptimizerFiles, resharding: Resharding) -> None:
    """Take over master weights and state, piece by piece, and set the parameters to the master weights, rounded.

    Collective over the data-parallel ranks.

    Raises:
        CheckpointError: a file is missing or is not what the layout says.
    """
    optimizer.forget()
    for index, master in enumerate(optimizer.masters):
        for start, piece in resharding.read(index, files.masters):
            master.write(start, start + len(piece), piece.to(master.low_precision.device))
        state = optimizer.optimizer.state[optimizer.fp32_groups_flat_partition[index]]
        for name in optimizer.rule.state_names:
            for start, piece in resharding.read(index, partial(files.state, name=name)):
                state[name][start : start + len(piece)].copy_(piece)
        state["step"].copy_(files.state(min(resharding.files()), index, "step"))
    optimizer.gather()
