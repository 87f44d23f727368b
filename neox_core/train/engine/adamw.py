"""AdamW (arXiv 1711.05101) on flat partitions in one pass: clip, update, round, clear the gradient.

The kernel reads and writes each of gradient, moments and weights once: 30 to 34 bytes per parameter.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from neox_core.kernels.dispatch import Kernel
from neox_core.train.engine.master_weights import MasterWeights

_CHUNK = 1 << 22


@dataclass(frozen=True)
class AdamWStep:
    """The numbers of one update."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    number: Tensor
    """Number of the update, from 1: a scalar on the device, which alone knows of updates that were not done."""

    def factors(self, scale: Tensor) -> Tensor:
        """Gradient factor, lr / (1 - beta1^number) and sqrt(1 - beta2^number), float64 [3] on the device."""
        number = self.number.double()
        return torch.stack([scale.double(), self.lr / (1 - self.beta1**number), (1 - self.beta2**number).sqrt()])


@Kernel
def adamw_update(
    weights: MasterWeights, gradient: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, scale: Tensor, step: AdamWStep
) -> None:
    """Update a partition in place, with `gradient x scale`, and set the gradient to zero.

    Where the scale is not above 0, nothing but the gradient changes; the host need not know.

    Args:
        gradient, exp_avg, exp_avg_sq: fp32, flat, as long as the weights.
        scale: fp32 scalar on the device: the clipping factor, or 0 for no update.
    """
    if gradient.is_cuda:
        from neox_core.train.engine.adamw_kernel import launch

        launch(weights, gradient, exp_avg, exp_avg_sq, scale, step)
        return
    clip, rate, bias_correction2_sqrt = step.factors(scale).tolist()
    if not clip > 0:
        gradient.zero_()
        return
    for start in range(0, gradient.numel(), _CHUNK):
        part = slice(start, min(start + _CHUNK, gradient.numel()))
        clipped, mean, square = gradient[part] * clip, exp_avg[part], exp_avg_sq[part]
        mean.lerp_(clipped, 1 - step.beta1)
        square.mul_(step.beta2).addcmul_(clipped, clipped, value=1 - step.beta2)
        master = weights.read(part.start, part.stop).mul_(1 - step.lr * step.weight_decay)
        denominator = square.sqrt().div_(bias_correction2_sqrt).add_(step.eps)
        master.addcdiv_(mean, denominator, value=-rate)
        weights.write(part.start, part.stop, master)
        gradient[part].zero_()
