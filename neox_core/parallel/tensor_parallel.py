"""Tensor parallelism (arXiv 1909.08053): how ranks exchange hidden states. layers.py says where.

A rank's layers are the model's own layers in narrower dimensions, so attention and MLP yield partial sums. Two
conjugate operators complete them: `copy_to_ranks` before a split region (identity forward, sum of gradients
backward) and `sum_over_ranks` after it (sum forward, identity backward).

With sequence parallelism (arXiv 2205.05198) the ranks split the tokens outside of these regions, where norms and the
residual stream would be the same on all: `gather_tokens` before a region (gather forward, reduce-scatter backward) and
`scatter_sum` after it (reduce-scatter forward, gather backward). A sum is a reduce-scatter and a gather, so that the
ranks exchange as much as without. A micro batch's B·T tokens are split in the order in which they lie in memory,
whatever the sequence they belong to, so that nothing is copied; a rank's part has the shape [B, T / ranks, D].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from neox_core.model.add_norm import Addends
from neox_core.parallel.overlap.exchange import Exchange
from neox_core.parallel.overlap.linears import gathered_outputs, summed_output
from neox_core.parallel.ranks.mesh import Mesh
from neox_core.parallel.weight_gradients import accumulators_of, linear_outputs


class _CopyToRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        total = x.contiguous().clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _MeanOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        total = x.contiguous().clone()
        dist.all_reduce(total, group=group)
        return total / dist.get_world_size(group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _MeanOverRanks.forward(ctx, gradient, ctx.group), None


def copy_to_ranks(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Identity; the gradient is summed over the group."""
    return _CopyToRanks.apply(x, group)  # type: ignore[no-untyped-call]


def sum_over_ranks(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum over the group; the gradient passes unchanged."""
    return _SumOverRanks.apply(x, group)  # type: ignore[no-untyped-call]


class _GatherTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return gathered(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _scattered(gradient, ctx.group), None


class _ScatterSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _scattered(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gathered(gradient, ctx.group), None


def gather_tokens(x_BTD: Tensor, group: dist.ProcessGroup) -> Tensor:
    """All ranks' tokens, from a part of them on each; of the gradient's sum, each gets its own part."""
    return _GatherTokens.apply(x_BTD, group)  # type: ignore[no-untyped-call]


def scatter_sum(x_BTD: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Each rank's part of the sum over the group; all ranks get the whole gradient."""
    return _ScatterSum.apply(x_BTD, group)  # type: ignore[no-untyped-call]


def gathered(part: Tensor, group: dist.ProcessGroup) -> Tensor:
    """All ranks' tokens, outside of any graph."""
    batch, tokens, *rest = part.shape
    whole = part.new_empty(batch, tokens * dist.get_world_size(group), *rest)
    dist.all_gather_into_tensor(whole.view(-1), part.contiguous().view(-1), group=group)
    return whole


def _scattered(whole: Tensor, group: dist.ProcessGroup) -> Tensor:
    batch, tokens, *rest = whole.shape
    part = whole.new_empty(batch, tokens // dist.get_world_size(group), *rest)
    dist.reduce_scatter_tensor(part.view(-1), whole.contiguous().view(-1), group=group)
    return part


@dataclass(frozen=True)
class SplitRegion:
    """How hidden states enter a region whose weights the ranks split, and how its partial sums leave it."""

    group: dist.ProcessGroup
    rank: int
    """Index in the group."""
    tokens_split: bool
    """The ranks split the tokens outside of the region."""
    exchange: Exchange | None = None
    """Moves split tokens alongside the products that read or make them; None: collectives do, before or after these."""

    @classmethod
    def of(cls, mesh: Mesh) -> SplitRegion | None:
        """The mesh's; None if one rank has all weights."""
        if mesh.tensor_size == 1:
            return None
        return cls(mesh.tensor_group, mesh.tensor_rank, mesh.sequence_parallel, mesh.exchange)

    def enter(self, x_BTD: Tensor) -> Tensor:
        """What every rank's part of the region reads: the hidden states of all tokens."""
        return gather_tokens(x_BTD, self.group) if self.tokens_split else copy_to_ranks(x_BTD, self.group)

    def leave(self, partial_BTD: Tensor) -> Tensor:
        """The sum of the ranks' partial sums, or this rank's tokens of it."""
        return scatter_sum(partial_BTD, self.group) if self.tokens_split else sum_over_ranks(partial_BTD, self.group)

    def mean(self, x: Tensor) -> Tensor:
        """The mean over the ranks of what each has of its own, and of its gradient, as all of them use the result."""
        return _MeanOverRanks.apply(x, self.group)  # type: ignore[no-untyped-call]

    def enter_linears(
        self, x_BTD: Tensor, repeatable: Callable[..., Tensor], *linears: nn.Linear
    ) -> tuple[Tensor, ...]:
        """Products with linear layers of what enters, without biases.

        Args:
            repeatable: is told what enters, and how it is made again (NoCheckpointing.repeatable).
        """

        def keep(entered_BTD: Tensor) -> Tensor:
            return repeatable(entered_BTD, gathered, x_BTD, self.group)

        if self.exchange is not None and _exchangeable(*linears):
            return gathered_outputs(x_BTD, self.exchange, keep, *linears)
        return linear_outputs(keep(self.enter(x_BTD)), *linears)

    def linear_leaves(self, x_BTI: Tensor, linear: nn.Linear) -> Addends:
        """The sum of the ranks' products, or this rank's tokens of it, without the bias."""
        if self.exchange is not None and _exchangeable(linear):
            return summed_output(x_BTI, self.exchange, linear)
        return (self.leave(*linear_outputs(x_BTI, linear)),)


def _exchangeable(*linears: nn.Linear) -> bool:
    return bool(accumulators_of(*linears)) or not torch.is_grad_enabled()
