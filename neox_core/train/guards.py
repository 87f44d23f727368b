"""What follows when a step's update was not done, because a number was not finite or the loss jumped.

The device decides about the update at once and the same on all ranks (see sharded_optimizer.py). The host learns of it
a step later, from a copy that it need not wait for, and then does what the configuration says.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import fmean, pstdev
from typing import Any, Literal

from torch import Tensor

from neox_core.config import GuardConfig
from neox_core.data.dataset import MixtureDataset
from neox_core.errors import TrainingError
from neox_core.train.engine.outcome import PendingOutcome, StepOutcome

_LATE = 2
"""A step's loss limit follows from the losses up to this many steps before: the one before it is not known in time."""


@dataclass(frozen=True)
class Batch:
    """The sequences of a step."""

    data: MixtureDataset
    first: int
    """Global index."""
    count: int


@dataclass(frozen=True)
class Incident:
    """A step whose update was not done."""

    outcome: StepOutcome
    batch: Batch
    problem: Literal["not finite", "spike"]
    limit: float
    """The loss above which a step was a spike."""
    action: Literal["stop", "skip", "rollback"]


class RollBackError(Exception):
    """Training has to go back to the last checkpoint, and on after the batch of this incident."""

    def __init__(self, incident: Incident) -> None:
        super().__init__(f"step {incident.outcome.step}: {incident.problem}")
        self.incident = incident


class Guard:
    """Sees every step's outcome, one step late, and acts on it.

    Args:
        config: what to do.
        set_limit: sets the device's loss limit for the steps to come.
        record: called with each incident, on all ranks at the same step, before its consequence.
    """

    def __init__(
        self, config: GuardConfig, set_limit: Callable[[float], None], record: Callable[[Incident], None]
    ) -> None:
        self._config, self._set_limit, self._record = config, set_limit, record
        self.restore({}, 0)

    def restore(self, state: Mapping[str, Any], rollbacks: int) -> None:
        """Go on from what `state` returned, with this many rollbacks so far; what was under way is forgotten."""
        self._pending: tuple[PendingOutcome, Batch] | None = None
        self._losses = deque(state.get("losses", ()), maxlen=self._config.spike_window)
        self._limits = {int(step): limit for step, limit in state.get("limits", ())}
        self._skips, self._rollbacks = state.get("skips", 0), rollbacks

    def state(self) -> dict[str, Any]:
        """As JSON values: what a resumed training needs to decide the same. Nothing may be under way."""
        assert self._pending is None, "the last step was not looked at"
        return {"losses": list(self._losses), "limits": sorted(self._limits.items()), "skips": self._skips}

    def begin(self, step: int) -> None:
        """A step is about to be computed."""
        if self._config.spike_sigma is not None:
            self._set_limit(self._limits.get(step, math.inf))

    def end(self, step: int, outcome: Tensor, batch: Batch) -> None:
        """A step was computed, or will be: act on the one before it.

        Args:
            outcome: packed, on the device.

        Raises:
            TrainingError, RollBackError: on all ranks.
        """
        before, self._pending = self._pending, (PendingOutcome(step, outcome), batch)
        self._judge(before)

    def drain(self) -> None:
        """Act on the last step too. Before a checkpoint, a validation and the end.

        Raises:
            TrainingError, RollBackError: on all ranks.
        """
        last, self._pending = self._pending, None
        self._judge(last)

    def _judge(self, pending: tuple[PendingOutcome, Batch] | None) -> None:
        if pending is None:
            return
        outcome, batch = pending[0].read(), pending[1]
        limit = self._limits.pop(outcome.step, math.inf)
        if outcome.applied:
            self._skips = 0
            self._losses.append(outcome.loss)
        if math.isfinite(next_limit := self._next_limit()):
            self._limits[outcome.step + _LATE] = next_limit
        if not outcome.applied:
            self._react(outcome, batch, limit)

    def _next_limit(self) -> float:
        sigma = self._config.spike_sigma
        if sigma is None or len(self._losses) < self._config.spike_window:
            return math.inf
        return fmean(self._losses) + sigma * pstdev(self._losses)

    def _react(self, outcome: StepOutcome, batch: Batch, limit: float) -> None:
        config = self._config
        wanted = config.on_spike if outcome.finite else config.on_not_finite
        exhausted = (wanted == "skip" and self._skips >= config.max_skips) or (
            wanted == "rollback" and self._rollbacks >= config.max_rollbacks
        )
        problem: Literal["not finite", "spike"] = "spike" if outcome.finite else "not finite"
        incident = Incident(outcome, batch, problem, limit, "stop" if exhausted else wanted)
        self._record(incident)
        if incident.action == "rollback":
            raise RollBackError(incident)
        if incident.action == "stop":
            raise TrainingError(_explain(incident, wanted, config))
        self._skips += 1


def _explain(incident: Incident, wanted: str, config: GuardConfig) -> str:
    outcome = incident.outcome
    what = f"step {outcome.step}: loss {outcome.loss}, gradient norm {outcome.gradient_norm}"
    if incident.problem == "spike":
        what += f", a spike (limit {incident.limit:.4g})"
    limits = {
        "skip": f" after train.guard.max_skips {config.max_skips} skipped steps in a row",
        "rollback": f" after train.guard.max_rollbacks {config.max_rollbacks} rollbacks",
    }
    return (
        f"{what}{limits.get(wanted, '')}. The update was not done, and this state is not saved: look at "
        "incidents.jsonl; run again to resume from the last checkpoint, with train.guard set to skip or rollback, or "
        "with a lower learning rate (train.changes), if it happens again"
    )
