"""A residual addition and the norm after it, or before it, in one pass.

A residual stream that is added to, normalized and passed on is read and written once, and so is its gradient, which
autograd would sum in a pass of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from neox_core.model.elementwise import add_and_normalize, norm_gradients, normalize_and_add, rms_norm


def add_norm(x: Tensor, addend: Tensor | None, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The sum of x and the addend (x alone where that is None), and the sum's RMS norm: [..., D] each."""
    return _AddNorm.apply(x, addend, scale, eps)  # type: ignore[no-untyped-call]


def norm_add(x: Tensor, residual: Tensor, scale: Tensor, eps: float) -> Tensor:
    """The residual with the RMS norm of x: [..., D] each."""
    return _NormAdd.apply(x, residual, scale, eps)  # type: ignore[no-untyped-call]


class _AddNorm(torch.autograd.Function):
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


class _NormAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor, scale: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, scale)
        ctx.eps = eps
        return normalize_and_add(x, residual, scale, eps)

    @staticmethod
    def backward(ctx: Any, d_total: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, scale = ctx.saved_tensors
        d_x, d_scale = norm_gradients(x, scale, None, d_total, ctx.eps)
        return d_x, d_total, d_scale, None
