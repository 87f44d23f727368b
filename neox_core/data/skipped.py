"""Sequences that a training left out: where each step's batch begins when it does not follow the one before it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from neox_core.config import TrainConfig, sequences_before


@dataclass(frozen=True)
class SkippedSequences:
    """A window of the mixture's order that training went back from and then passed over. JSON values only."""

    after_step: int
    """The step whose state training went back to: the window is what that state's next batch would have begun with."""
    first: int
    """Global index of the window's first sequence."""
    count: int


def first_sequence(train: TrainConfig, step: int, skipped: Sequence[SkippedSequences] = ()) -> int:
    """Global index of the first sequence of a step's batch."""
    return sequences_before(train, step) + sum(window.count for window in skipped if window.after_step < step)
