"""Learning rate of each step."""

from __future__ import annotations

import math

from neox_core.config.train_sections import TrainConfig


def learning_rate(step: int, train: TrainConfig) -> float:
    """Linear warmup to the peak, decay to `min_lr_ratio` of it, then constant.

    cosine: arXiv 2310.10631, section 2.2. wsd: stable at the peak until the decay's first step, arXiv 2404.06395; a
    decay of linear shape or 1 - sqrt(progress), arXiv 2405.18392, equation 2.

    Args:
        step: number of the update, from 1.
    """
    schedule, peak = train.schedule, _peak(step, train)
    if step <= schedule.warmup_steps:
        return peak * step / schedule.warmup_steps
    first, last = _decay(train)
    progress = min(1.0, max(0, step - first) / max(1, last - first))
    return peak * (schedule.min_lr_ratio + (1 - schedule.min_lr_ratio) * _remaining(progress, train))


def _peak(step: int, train: TrainConfig) -> float:
    """The peak that is in force at a step."""
    changed = [change.lr for change in train.changes if change.lr is not None and change.from_step <= step]
    return changed[-1] if changed else train.optimizer.lr


def _decay(train: TrainConfig) -> tuple[int, int]:
    """The last step at the peak, and the step of the minimum."""
    schedule = train.schedule
    if schedule.kind == "cosine":
        return schedule.warmup_steps, train.decay_steps
    length = schedule.decay_steps or round(schedule.decay_share * train.steps)
    return max(schedule.warmup_steps, train.steps - length), train.steps


def _remaining(progress: float, train: TrainConfig) -> float:
    """Part of the way from the minimum to the peak that is left."""
    if train.schedule.kind == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    return 1 - (progress if train.schedule.decay_shape == "linear" else math.sqrt(progress))
