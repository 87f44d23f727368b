"""What an optimizer is to the rest of the software."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from neox_core.optimizer.master_weights import MasterWeights

STATE_BYTES = 4
"""Of each of a rule's state tensors, per parameter: fp32."""


@dataclass(frozen=True)
class UpdateStep:
    """The numbers of one update of one group of parameters."""

    lr: float
    weight_decay: float
    number: Tensor
    """Number of the update, from 1: a scalar on the device, which alone knows of updates that were not done."""


class UpdateRule(Protocol):
    """An optimizer: element by element, on flat partitions that may begin and end within a parameter."""

    @property
    def state_names(self) -> tuple[str, ...]:
        """Names of the fp32 tensors, as long as the weights and 0 at first, that it keeps; so checkpoints call them."""

    def update(
        self, weights: MasterWeights, gradient: Tensor, state: Mapping[str, Tensor], scale: Tensor, step: UpdateStep
    ) -> None:
        """Update a partition in place, with `gradient x scale`, and set the gradient to zero.

        Where the scale is not above 0, nothing but the gradient changes; the host need not know.

        Args:
            gradient: fp32, flat, as long as the weights.
            state: its tensors by name.
            scale: fp32 scalar on the device: the clipping factor, or 0 for no update.
        """
