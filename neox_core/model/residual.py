"""A block's additions joined with its norms: the same numbers as TransformerBlock's own forward, in fewer passes.

A residual stream that is added to, normalized and handed on is read and written once, and so is its gradient, which
autograd would sum in a pass of its own.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from neox_core.model.elementwise import add_and_normalize, norm_gradients, rms_norm
from neox_core.model.llama import RMSNorm, TransformerBlock


def join_residuals(block: TransformerBlock) -> None:
    """Replace a block's forward by one that adds and normalizes in one pass. Hooks on its parts stay in force.

    Each of its norms gets a method `fork`: (x, addend or None) -> the sum, and its norm.
    """
    for norm in (block.input_layernorm, block.post_attention_layernorm):
        norm.fork = partial(_fork, norm)  # type: ignore[assignment]
    block.forward = partial(_forward, block)  # type: ignore[method-assign]


def _forward(block: TransformerBlock, x_BTD: Tensor, positions_BT: Tensor | None = None) -> Tensor:
    first: Any = block.input_layernorm
    second: Any = block.post_attention_layernorm
    x_BTD, normed_BTD = first.fork(x_BTD)
    h_BTD, normed_BTD = second.fork(x_BTD, block.attention(normed_BTD, positions_BT))
    return h_BTD + block.mlp(normed_BTD)


def _fork(norm: RMSNorm, x: Tensor, addend: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The sum of x and the addend, and its norm."""
    return _ResidualNorm.apply(x, addend, norm.scale, norm.eps)  # type: ignore[no-untyped-call]


class _ResidualNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, addend: Tensor | None, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        if addend is None:
            total, normed = x.view_as(x), rms_norm(x, scale, eps)
        else:
            total, normed = add_and_normalize(x, addend, scale, eps)
        ctx.save_for_backward(total, scale)
        ctx.eps, ctx.added = eps, addend is not None
        return total, normed

    @staticmethod
    def backward(ctx: Any, d_total: Tensor, d_normed: Tensor) -> tuple[Tensor, Tensor | None, Tensor, None]:
        total, scale = ctx.saved_tensors
        d_x, d_scale = norm_gradients(total, scale, d_total, d_normed, ctx.eps)
        return d_x, d_x if ctx.added else None, d_scale, None
