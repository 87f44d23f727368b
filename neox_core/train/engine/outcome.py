"""What a step came to: made on the device, read by the host when it is there, so that neither waits for the other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_HEAD = 1
"""Values before those of all ranks and of this one: whether the update was done."""


def pack_outcome(applied: Tensor, all_ranks: Tensor, own: Tensor) -> Tensor:
    """One vector, so that one copy brings it to the host.

    Args:
        applied: whether the update was done.
        all_ranks, own: loss, squared gradient norm, squared norms of groups of layers [2 + groups]: the sum over all
            ranks, and this rank's share of it.
    """
    return torch.cat([applied.to(own.dtype).view(1), all_ranks, own])


def applied_of(outcome: Tensor) -> Tensor:
    """Whether the update of a packed outcome was done, on its device."""
    return outcome[0] > 0


def loss_of(outcome: Tensor) -> Tensor:
    """The loss of a packed outcome, on its device."""
    return outcome[_HEAD]


def gradient_norm_of(outcome: Tensor) -> Tensor:
    """The whole model's gradient norm before clipping, of a packed outcome, on its device."""
    return outcome[_HEAD + 1].sqrt()


def group_norms_of(outcome: Tensor) -> Tensor:
    """The norms of groups of layers of a packed outcome, on its device."""
    width = (len(outcome) - _HEAD) // 2
    return outcome[_HEAD + 2 : _HEAD + width].sqrt()


@dataclass(frozen=True)
class StepOutcome:
    """A step's numbers on the host."""

    step: int
    applied: bool
    """Whether the weights were updated: the same on all ranks."""
    loss: float
    """Mean over the global batch, nats."""
    gradient_norm: float
    """Of the whole model, before clipping."""
    group_norms: tuple[float, ...]
    """Of groups of layers, in the order of the engine's `gradient_groups`."""
    own: tuple[float, ...]
    """This rank's share: loss, squared norm, squared norms of groups."""

    @property
    def finite(self) -> bool:
        """Whether loss and gradient are."""
        return math.isfinite(self.loss) and math.isfinite(self.gradient_norm)

    @property
    def own_loss_finite(self) -> bool:
        """Whether this rank's share of the loss is."""
        return math.isfinite(self.own[0])

    @property
    def own_finite(self) -> bool:
        """Whether this rank's share is."""
        return all(map(math.isfinite, self.own))

    @classmethod
    def unpack(cls, step: int, values: Sequence[float]) -> StepOutcome:
        """From the values of `pack_outcome`."""
        width = (len(values) - _HEAD) // 2
        whole, own = values[_HEAD : _HEAD + width], values[_HEAD + width :]
        loss, square, *groups = whole
        return cls(step, bool(values[0]), loss, _root(square), tuple(map(_root, groups)), tuple(own))


class PendingOutcome:
    """An outcome on its way to the host."""

    def __init__(self, step: int, outcome: Tensor) -> None:
        self.step, self._values = step, outcome
        self._arrived: torch.cuda.Event | None = None
        if outcome.is_cuda:
            self._values = torch.empty(outcome.shape, pin_memory=True).copy_(outcome, non_blocking=True)
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record()

    def read(self) -> StepOutcome:
        """Wait until it is there."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return StepOutcome.unpack(self.step, self._values.tolist())


def _root(square: float) -> float:
    return math.sqrt(square) if square >= 0 else math.nan
