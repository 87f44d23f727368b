"""Learning rate of each step."""

from __future__ import annotations

import math

from neox_core.config.schema import TrainConfig


def learning_rate(step: int, train: TrainConfig) -> float:
    """Linear warmup, cosine decay to `min_lr_ratio` of the peak, then constant (arXiv 2310.10631, section 2.2).

    Args:
        step: number of the update, from 1.
    """
    peak, floor = train.optimizer.lr, train.schedule.min_lr_ratio
    warmup, end = train.schedule.warmup_steps, train.decay_steps
    if step <= warmup:
        return peak * step / warmup
    progress = min(1.0, (step - warmup) / max(1, end - warmup))
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))
