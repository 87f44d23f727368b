"""Tensor parallelism, applied to the model from outside (arXiv 1909.08053).

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

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from neox_core.model import OutputHead, TokenEmbedding, TransformerBlock
from neox_core.parallel.mesh import Mesh


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


def apply_tensor_parallel(layer: nn.Module, mesh: Mesh) -> None:
    """Complete a layer that was built in one rank's dimensions."""
    if mesh.tensor_size == 1:
        return
    if isinstance(layer, TransformerBlock):
        _split_region(layer.attention, mesh)
        _split_region(layer.mlp, mesh)
    elif isinstance(layer, TokenEmbedding):
        _split_vocabulary(layer, mesh)
    elif isinstance(layer, OutputHead):
        _complete_input(layer, mesh)


def _complete_input(region: nn.Module, mesh: Mesh) -> None:
    complete = gather_tokens if mesh.sequence_parallel else copy_to_ranks
    region.register_forward_pre_hook(lambda _, args: (complete(args[0], mesh.tensor_group), *args[1:]))


def _complete_sum(region: nn.Module, mesh: Mesh) -> None:
    complete = scatter_sum if mesh.sequence_parallel else sum_over_ranks
    region.register_forward_hook(lambda _module, _args, output: complete(output, mesh.tensor_group))


def _split_region(region: nn.Module, mesh: Mesh) -> None:
    _complete_input(region, mesh)
    _complete_sum(region, mesh)


def _split_vocabulary(embedding: TokenEmbedding, mesh: Mesh) -> None:
    """Each rank looks up the ids in its part of the vocabulary; others contribute zeros to the sum."""
    size = embedding.word_embeddings.num_embeddings
    first = size * mesh.tensor_rank
    lookup = embedding.word_embeddings.forward

    def look_up_own(ids_BT: Tensor) -> Tensor:
        foreign = (ids_BT < first) | (ids_BT >= first + size)
        vectors = lookup((ids_BT - first).masked_fill(foreign, 0))
        return vectors.masked_fill(foreign.unsqueeze(-1), 0)

    embedding.word_embeddings.forward = look_up_own  # type: ignore[method-assign, assignment]
    _complete_sum(embedding.word_embeddings, mesh)
