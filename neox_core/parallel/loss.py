"""Cross-entropy over a vocabulary that is split among tensor-parallel ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from neox_core.model.elementwise import fused_on_cuda

IGNORE_INDEX = -1
"""Target of a position that does not count."""


class _VocabParallelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits_BTV: Tensor, targets_BT: Tensor, group: dist.ProcessGroup, rank: int, z_loss: float
    ) -> Tensor:
        local_BT = targets_BT - logits_BTV.shape[-1] * rank
        own = softmax_part(logits_BTV, local_BT)
        parts = own.new_empty(dist.get_world_size(group), *own.shape)
        dist.all_gather_into_tensor(parts.view(-1), own.view(-1), group=group)
        losses, maximum, normalizer = losses_of_parts(parts, targets_BT)
        ctx.save_for_backward(logits_BTV, local_BT, targets_BT, maximum, normalizer)
        ctx.z_loss = z_loss
        return losses

    @staticmethod
    def backward(ctx: Any, gradient_BT: Tensor) -> tuple[Tensor, None, None, None, None]:
        logits, local, targets, maximum, normalizer = ctx.saved_tensors
        gradient = logit_gradients(logits, local, targets, maximum, normalizer, gradient_BT, ctx.z_loss)
        return gradient, None, None, None, None


@fused_on_cuda
def softmax_part(logits_BTV: Tensor, local_BT: Tensor) -> Tensor:
    """What a rank knows of each position's softmax, fp32 [3,B,T]: its largest logit, the sum of its exponentials with
    that taken out, and the target's logit.

    Args:
        logits_BTV: of the rank's part of the vocabulary.
        local_BT: targets as indices of that part; others are those of other ranks, which give 0.
    """
    logits = logits_BTV.float()
    maximum = logits.amax(-1)
    total = (logits - maximum.unsqueeze(-1)).exp_().sum(-1)
    foreign = (local_BT < 0) | (local_BT >= logits.shape[-1])
    target = logits.gather(-1, local_BT.masked_fill(foreign, 0).unsqueeze(-1)).squeeze(-1)
    return torch.stack((maximum, total, target.masked_fill(foreign, 0)))


@fused_on_cuda
def losses_of_parts(parts_RKBT: Tensor, targets_BT: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """From all ranks' `softmax_part`, in the same order on each: losses, largest logits and normalizers, [B,T] each."""
    maxima, totals, targets = parts_RKBT.unbind(1)
    maximum = maxima.amax(0)
    normalizer = (totals * (maxima - maximum).exp()).sum(0)
    losses = normalizer.log() - (targets.sum(0) - maximum)
    return losses.masked_fill(targets_BT == IGNORE_INDEX, 0), maximum, normalizer


@fused_on_cuda
def logit_gradients(
    logits_BTV: Tensor,
    local_BT: Tensor,
    targets_BT: Tensor,
    maximum_BT: Tensor,
    normalizer_BT: Tensor,
    gradient_BT: Tensor,
    z_loss: float,
) -> Tensor:
    """d loss / d logit = probability - [logit is the target's], times the losses' gradients: [B,T,V]."""
    weight = gradient_BT.masked_fill(targets_BT == IGNORE_INDEX, 0)
    scale = weight / normalizer_BT
    if z_loss:
        scale = scale * (1 + 2 * z_loss * (normalizer_BT.log() + maximum_BT))
    weighted = (logits_BTV.float() - maximum_BT.unsqueeze(-1)).exp_().mul_(scale.unsqueeze(-1))
    is_target = torch.arange(logits_BTV.shape[-1], device=logits_BTV.device) == local_BT.unsqueeze(-1)
    return torch.where(is_target, weighted - weight.unsqueeze(-1), weighted).to(logits_BTV.dtype)


def token_losses(
    logits_BTV: Tensor, targets_BT: Tensor, group: dist.ProcessGroup, rank: int, z_loss: float = 0.0
) -> Tensor:
    """-log p(target) of each position, in fp32 nats; 0 where the target is IGNORE_INDEX.

    The gradient is that of -log p + z_loss (log Z)^2, Z being the sum that normalizes p (arXiv 2204.02311, section 5):
    it keeps Z near 1. The value stays the cross-entropy, which can be compared between runs.

    Args:
        logits_BTV: this rank's part of the vocabulary, in order of rank.
        targets_BT: ids in the whole vocabulary.
        group: the tensor-parallel group.
        rank: this rank's index in it.
        z_loss: coefficient of (log Z)^2.
    """
    if dist.get_world_size(group) == 1:
        return whole_vocabulary_losses(logits_BTV, targets_BT, z_loss)
    return _VocabParallelCrossEntropy.apply(  # type: ignore[no-untyped-call]
        logits_BTV, targets_BT, group, rank, z_loss
    )


@fused_on_cuda
def whole_vocabulary_losses(logits_BTV: Tensor, targets_BT: Tensor, z_loss: float) -> Tensor:
    """token_losses of one rank that has the whole vocabulary."""
    logits = logits_BTV.float().flatten(0, -2)
    losses = F.cross_entropy(logits, targets_BT.flatten(), ignore_index=IGNORE_INDEX, reduction="none").view_as(
        targets_BT
    )
    if z_loss:
        largest = logits.detach().amax(-1)  # taken out, so that the gradient does not round the sum of large logits
        log_z = largest + (logits - largest.unsqueeze(-1)).logsumexp(-1)
        squares = log_z.square().view_as(targets_BT).masked_fill(targets_BT == IGNORE_INDEX, 0)
        losses = losses + z_loss * (squares - squares.detach())
    return losses


class ChunkedLoss:
    """Loss over a micro batch that never holds the logits of more than `chunk_tokens` positions.

    A chunk's logits are computed in the forward pass and, unless `early_gradient` is set, once more in the backward
    pass.

    The sum of the losses is divided by the number of positions, whether they count or not. How many of the global
    batch count is known when all micro batches are through; loss and gradient are then divided by the share of those
    that do, so that each token has the same weight, in whatever micro batch it is.

    Args:
        chunk_tokens: positions at a time.
        group: the tensor-parallel group.
        rank: this rank's index in it.
        z_loss: see token_losses.
    """

    def __init__(self, chunk_tokens: int, group: dist.ProcessGroup, rank: int, z_loss: float = 0.0) -> None:
        self._chunk_tokens, self._group, self._rank, self._z_loss = chunk_tokens, group, rank, z_loss
        self._counted: list[Tensor] = []
        self._positions = 0
        self.project: Callable[[Tensor], Tensor] | None = None
        """Hidden states [B,T,D] to this rank's part of the logits; set on the stage that holds the head."""
        self.on_token_losses: Callable[[Tensor, Tensor], None] | None = None
        """Given the losses [B,T] and the targets [B,T] of each micro batch, for statistics."""
        self._token_losses: list[Tensor] | None = None
        self.early_gradient: float | None = None
        """The gradient that the loss will be given. With it, a chunk's gradients are computed with its loss, which
        saves a third of the head's products. Only for a head that adds its weight's gradient to a buffer of its own."""

    def __call__(self, hidden_BTD: Tensor, targets_BT: Tensor) -> Tensor:
        """Sum over the positions that count / all positions, in fp32 nats."""
        self.count(targets_BT)
        return self.mean(hidden_BTD, targets_BT)

    def count(self, targets_BT: Tensor) -> None:
        """Take a micro batch's positions into the share of those that count."""
        self._counted.append((targets_BT != IGNORE_INDEX).sum())
        self._positions += targets_BT.numel()

    def mean(self, hidden_BTD: Tensor, targets_BT: Tensor) -> Tensor:
        """The loss alone, which does the same work every time."""
        hidden, targets = hidden_BTD.flatten(0, 1), targets_BT.flatten()
        if self.on_token_losses is None:
            return self._mean(hidden, targets)
        self._token_losses = []
        try:
            loss = self._mean(hidden, targets)
            token_losses = torch.cat(self._token_losses, -1)
        finally:
            self._token_losses = None  # from now on, chunks are computed again only
        self.on_token_losses(token_losses.view_as(targets_BT), targets_BT)
        return loss

    def _mean(self, hidden_TD: Tensor, targets_T: Tensor) -> Tensor:
        if self.early_gradient is not None and torch.is_grad_enabled():
            return _EarlyGradient.apply(hidden_TD, targets_T, self, self.early_gradient)  # type: ignore[no-untyped-call]
        total = torch.stack(
            [
                checkpoint(self.sum, h, t, use_reentrant=False, preserve_rng_state=False)
                for h, t in self.chunks(hidden_TD, targets_T)
            ]
        ).sum()
        return total / targets_T.numel()

    def take_counted_share(self) -> Tensor:
        """Share of the positions since the last call that counted, float64; exactly 1 if all did."""
        share = torch.stack(self._counted).sum().double() / self._positions
        self._counted, self._positions = [], 0
        return share

    def chunks(self, hidden_TD: Tensor, targets_T: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
        """Parts of at most `chunk_tokens` positions."""
        sizes = self._chunk_tokens
        return zip(torch.split(hidden_TD, sizes), torch.split(targets_T, sizes), strict=True)

    def sum(self, hidden_TD: Tensor, targets_T: Tensor) -> Tensor:
        """Sum of a chunk's losses, in fp32 nats."""
        assert self.project is not None, "this stage has no output head"
        logits = self.project(hidden_TD[None])
        losses = token_losses(logits, targets_T[None], self._group, self._rank, self._z_loss)
        if self._token_losses is not None:
            self._token_losses.append(losses.detach())
        return losses.sum()


class _EarlyGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, targets_T: Tensor, loss: ChunkedLoss, expected: float) -> Tensor:
        upstream = hidden_TD.new_full((), expected / targets_T.numel(), dtype=torch.float32)
        sums: list[Tensor] = []
        gradients: list[Tensor] = []
        for hidden, targets in loss.chunks(hidden_TD, targets_T):
            with torch.enable_grad():
                hidden = hidden.detach().requires_grad_()
                chunk = loss.sum(hidden, targets)
            gradients += torch.autograd.grad(chunk, hidden, upstream)
            sums.append(chunk.detach())
        ctx.save_for_backward(torch.cat(gradients))
        ctx.expected = expected
        return torch.stack(sums).sum() / targets_T.numel()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        # Checked on the device, since the weights' gradients are in their buffers already.
        torch._assert_async(gradient == ctx.expected, "the loss got another gradient than early_gradient")
        return ctx.saved_tensors[0], None, None, None
