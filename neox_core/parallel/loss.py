"""Cross-entropy over a vocabulary that is split among tensor-parallel ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

IGNORED = -1
"""Target of a position that does not count."""


class _VocabParallelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_BTV: Tensor, targets_BT: Tensor, group: dist.ProcessGroup, rank: int) -> Tensor:
        logits = logits_BTV.float()
        maximum = logits.amax(-1)
        dist.all_reduce(maximum, op=dist.ReduceOp.MAX, group=group)
        exponentials = (logits - maximum.unsqueeze(-1)).exp_()
        size = logits.shape[-1]
        local = targets_BT - size * rank
        foreign = (local < 0) | (local >= size)
        local = local.masked_fill(foreign, 0).unsqueeze(-1)
        target_logit = (logits.gather(-1, local).squeeze(-1) - maximum).masked_fill(foreign, 0)
        sums = torch.stack((exponentials.sum(-1), target_logit))
        dist.all_reduce(sums, group=group)
        normalizer, target_logit = sums
        probabilities = exponentials.div_(normalizer.unsqueeze(-1))
        ctx.save_for_backward(probabilities, local, foreign, targets_BT)
        ctx.dtype = logits_BTV.dtype
        return (normalizer.log() - target_logit).masked_fill(targets_BT == IGNORED, 0)

    @staticmethod
    def backward(ctx: Any, gradient_BT: Tensor) -> tuple[Tensor, None, None, None]:
        probabilities, local, foreign, targets = ctx.saved_tensors
        # d loss / d logit = probability - [logit is the target's]
        difference = probabilities.scatter_add(-1, local, -(~foreign).to(probabilities.dtype).unsqueeze(-1))
        weight = gradient_BT.masked_fill(targets == IGNORED, 0).unsqueeze(-1)
        return (difference * weight).to(ctx.dtype), None, None, None


def token_losses(logits_BTV: Tensor, targets_BT: Tensor, group: dist.ProcessGroup, rank: int) -> Tensor:
    """-log p(target) of each position, in fp32 nats; 0 where the target is IGNORED.

    Args:
        logits_BTV: this rank's part of the vocabulary, in order of rank.
        targets_BT: ids in the whole vocabulary.
        group: the tensor-parallel group.
        rank: this rank's index in it.
    """
    return _VocabParallelCrossEntropy.apply(  # type: ignore[no-untyped-call]
        logits_BTV, targets_BT, group, rank
    )
