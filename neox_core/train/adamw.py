"""AdamW (arXiv 1711.05101) on flat partitions in one pass: clip, update, round, clear the gradient.

The kernel reads and writes each of gradient, moments and weights once: 30 to 34 bytes per parameter.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from neox_core.train.master_weights import MasterWeights

_CHUNK = 1 << 22


@dataclass(frozen=True)
class AdamWStep:
    """The numbers of one update."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    step: int
    """Number of the update, from 1."""

    @property
    def bias_correction1(self) -> float:
        """1 - beta1^step"""
        return 1 - float(self.beta1**self.step)

    @property
    def bias_correction2_sqrt(self) -> float:
        """sqrt(1 - beta2^step)"""
        return float((1 - self.beta2**self.step) ** 0.5)


def adamw_update(
    weights: MasterWeights, gradient: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, scale: Tensor, step: AdamWStep
) -> None:
    """Update a partition in place, with `gradient x scale`, and set the gradient to zero.

    Args:
        gradient, exp_avg, exp_avg_sq: fp32, flat, as long as the weights.
        scale: fp32 scalar on the device: the clipping factor.
    """
    if gradient.is_cuda:
        from neox_core.train.adamw_kernel import launch

        launch(weights, gradient, exp_avg, exp_avg_sq, scale, step)
        return
    for start in range(0, gradient.numel(), _CHUNK):
        part = slice(start, min(start + _CHUNK, gradient.numel()))
        clipped, mean, square = gradient[part] * scale, exp_avg[part], exp_avg_sq[part]
        mean.lerp_(clipped, 1 - step.beta1)
        square.mul_(step.beta2).addcmul_(clipped, clipped, value=1 - step.beta2)
        master = weights.read(part.start, part.stop).mul_(1 - step.lr * step.weight_decay)
        denominator = square.sqrt().div_(step.bias_correction2_sqrt).add_(step.eps)
        master.addcdiv_(mean, denominator, value=-step.lr / step.bias_correction1)
        weights.write(part.start, part.stop, master)
        gradient[part].zero_()
