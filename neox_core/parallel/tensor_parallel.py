"""Tensor parallelism, applied to the model from outside (arXiv 1909.08053).

A rank's layers are the model's own layers in narrower dimensions, so attention and MLP yield partial sums. Two
conjugate operators complete them: `copy_to_ranks` before a split region (identity forward, sum of gradients
backward) and `sum_over_ranks` after it (sum forward, identity backward).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from neox_core.model import OutputHead, TokenEmbedding, TransformerBlock
from neox_core.parallel.mesh import Mesh

_REPLICATED = ("layernorm.scale", "norm.scale")


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


def apply_tensor_parallel(layer: nn.Module, mesh: Mesh) -> None:
    """Complete a layer that was built in one rank's dimensions, and mark which of its parameters are split."""
    for name, parameter in layer.named_parameters():
        if not name.endswith(_REPLICATED):
            # DeepSpeed sums the squared norm of marked parameters over ranks, and counts others once.
            parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
    if mesh.tensor_size == 1:
        return
    if isinstance(layer, TransformerBlock):
        _split_region(layer.attention, mesh.tensor_group)
        _split_region(layer.mlp, mesh.tensor_group)
    elif isinstance(layer, TokenEmbedding):
        _split_vocabulary(layer, mesh)
    elif isinstance(layer, OutputHead):
        _copy_input(layer, mesh.tensor_group)


def _copy_input(region: nn.Module, group: dist.ProcessGroup) -> None:
    region.register_forward_pre_hook(lambda _, args: (copy_to_ranks(args[0], group), *args[1:]))


def _split_region(region: nn.Module, group: dist.ProcessGroup) -> None:
    _copy_input(region, group)
    region.register_forward_hook(lambda _module, _args, output: sum_over_ranks(output, group))


def _split_vocabulary(embedding: TokenEmbedding, mesh: Mesh) -> None:
    """Each rank looks up the ids in its part of the vocabulary; others contribute zeros to the sum."""
    size = embedding.word_embeddings.num_embeddings
    first = size * mesh.tensor_rank
    lookup = embedding.word_embeddings.forward

    def look_up_own(ids_BT: Tensor) -> Tensor:
        foreign = (ids_BT < first) | (ids_BT >= first + size)
        vectors = lookup((ids_BT - first).masked_fill(foreign, 0))
        return sum_over_ranks(vectors.masked_fill(foreign.unsqueeze(-1), 0), mesh.tensor_group)

    embedding.word_embeddings.forward = look_up_own  # type: ignore[method-assign, assignment]
