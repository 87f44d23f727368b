"""The engine's face: all that the rest of the training knows of what computes its steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from neox_core.checkpoint.partitions import Place
from neox_core.checkpoint.resharding import Resharding
from neox_core.checkpoint.writer import TakeFile
from neox_core.parallel.build import LayerWeights

Batches = Iterator[tuple[Tensor | tuple[Tensor, Tensor], Tensor]]
"""Micro batches as the pipeline takes them: inputs [B,T] (with positions within documents [B,T]), targets [B,T]."""


class StepEngine(Protocol):
    """Computes steps and holds the state: weights, optimizer, counters. Of the host it asks nothing during a step.

    All of it is collective over all ranks, but for what only sets, says or asks something.
    """

    @property
    def gradient_groups(self) -> tuple[str, ...]:
        """Names of the groups of layers whose gradient norms are in an outcome."""

    @property
    def outcome(self) -> Tensor:
        """What the last step came to, on the device (see outcome.py)."""

    def train_batch(self, batches: Batches) -> Tensor:
        """Forward, backward and update on the next micro batches.

        The update is left out, on all ranks, if loss or gradient are not finite or the loss is above its limit.

        Returns:
            Mean loss over the positions of the global batch that count, nats, fp32, on the device.
        """

    def eval_batch(self, batches: Batches, num_micro_batches: int, own: int | None = None) -> Tensor:
        """Mean loss over the positions that count of so many micro batches per data-parallel rank, on the device.

        Args:
            own: this rank's number where it has fewer than others.
        """

    def set_accumulation_steps(self, steps: int, own: int | None = None) -> None:
        """Micro batches per data-parallel rank from now on. Between steps only.

        Args:
            own: this rank's number where it has fewer than others, at least 1.
        """

    def set_learning_rate(self, rate: float) -> None:
        """Of the steps from now on."""

    def set_loss_limit(self, limit: float) -> None:
        """Above it, a loss stops the update: infinity at first."""

    def observe(
        self, on_phase: Callable[[str], None] | None, on_token_losses: Callable[[Tensor, Tensor], None] | None
    ) -> None:
        """Replace the observers of the steps from now on; None: nobody.

        Args:
            on_phase: called as a step comes to its phases "reduce" and "optimizer".
            on_token_losses: called with each micro batch's token losses and targets [B,T], on one of the ranks that
                have the same.
        """

    def load_weights(self, weights: LayerWeights) -> None:
        """Take these weights, and forget all steps before.

        Raises:
            CheckpointError: they are not finite, or the fp32 master weights are not the weights that were loaded.
        """

    def save_state(self, folder: Path, tag: str, notes: Mapping[str, Any], take: TakeFile) -> None:
        """Hand over this rank's files of the state, one after the other.

        Args:
            folder, tag: the files' paths are `folder/tag/<name>`.
            notes: JSON values that are kept with the state.
            take: copies the tensors, or has the current stream copy them, before it returns. Numbers that are not a
                tensor in memory come as what copies them (checkpoint/host_memory.py).

        Raises:
            TrainingError: `load_state` would not take the state, as of NaNs; nothing is handed over.
        """

    def load_state(self, folder: Path, tag: str) -> None:
        """Load what `save_state` handed over in the same layout, from the files that `shared_file` and `optimizer_file`
        name.

        Raises:
            CheckpointError: the master weights that were loaded do not round to the weights.
        """

    def load_resharded(self, folder: Path, tag: str, step: int, resharding: Resharding) -> None:
        """Load what `save_state` handed over in another layout after a step, from the optimizer's files of those ranks
        that `resharding` names.

        Raises:
            CheckpointError: a file is missing or is not what the layout says.
        """

    def shared_file(self, name: str) -> bool:
        """Whether loading needs this file of a checkpoint on every node."""

    def close(self) -> None:
        """No step comes any more. Before the process group ends."""

    def optimizer_file(self, name: str, place: Place, tensor_size: int) -> bool:
        """Whether this file of a checkpoint is the optimizer's of a rank among so many tensor-parallel ones."""
