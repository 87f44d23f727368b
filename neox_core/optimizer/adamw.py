"""AdamW (arXiv 1711.05101) on flat partitions in one pass: clip, update, round, clear the gradient.

The kernel reads and writes each of gradient, moments and weights once: 30 to 34 bytes per parameter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from neox_core.optimizer.master_weights import MasterWeights
from neox_core.optimizer.rule import UpdateStep

_CHUNK = 1 << 22


@dataclass(frozen=True)
class AdamW:
    """See UpdateRule for the methods."""

    beta1: float
    beta2: float
    eps: float
    state_names: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")

    def update(
        self, weights: MasterWeights, gradient: Tensor, state: Mapping[str, Tensor], scale: Tensor, step: UpdateStep
    ) -> None:
        """One kernel on a GPU; on a CPU in chunks, whose temporary tensors are small."""
        exp_avg, exp_avg_sq = (state[name] for name in self.state_names)
        if gradient.is_cuda:
            from neox_core.optimizer.adamw_kernel import launch

            constants = self.beta1, self.beta2, self.eps, 1 - step.lr * step.weight_decay
            launch(weights, gradient, exp_avg, exp_avg_sq, self._factors(scale, step).float(), constants)
            return
        clip, rate, bias_correction2_sqrt = self._factors(scale, step).tolist()
        if not clip > 0:
            gradient.zero_()
            return
        for start in range(0, gradient.numel(), _CHUNK):
            part = slice(start, min(start + _CHUNK, gradient.numel()))
            clipped, mean, square = gradient[part] * clip, exp_avg[part], exp_avg_sq[part]
            mean.lerp_(clipped, 1 - self.beta1)
            square.mul_(self.beta2).addcmul_(clipped, clipped, value=1 - self.beta2)
            master = weights.read(part.start, part.stop).mul_(1 - step.lr * step.weight_decay)
            denominator = square.sqrt().div_(bias_correction2_sqrt).add_(self.eps)
            master.addcdiv_(mean, denominator, value=-rate)
            weights.write(part.start, part.stop, master)
            gradient[part].zero_()

    def _factors(self, scale: Tensor, step: UpdateStep) -> Tensor:
        """Gradient factor, lr / (1 - beta1^number) and sqrt(1 - beta2^number), float64 [3] on the device."""
        number = step.number.double()
        return torch.stack([scale.double(), step.lr / (1 - self.beta1**number), (1 - self.beta2**number).sqrt()])
