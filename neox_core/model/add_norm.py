"""A residual addition and the norm after it, or before it, in one pass.

A residual stream that is added to, normalized and passed on is read and written once, and so is its gradient, which
autograd would sum in a pass of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from neox_core.model.elementwise import add_all, add_and_normalize, norm_gradients, normalize_and_add, rms_norm

Addends = tuple[Tensor, ...]
"""Tensors whose sum is meant, which nobody has made yet: the next pass over memory does. The first is of autograd's
graph, and its gradient is the sum's; the others may be outside of the graph."""


def add(x: Tensor, *addends: Tensor) -> Tensor:
    """The sum of x and the addends, of which there may be none: [..., D] each."""
    return _Add.apply(x, *addends) if addends else x  # type: ignore[no-untyped-call]


def add_norm(x: Tensor, addends: Addends, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The sum of x and the addends, of which there may be none, and the sum's RMS norm: [..., D] each."""
    return _AddNorm.apply(x, scale, eps, *addends)  # type: ignore[no-untyped-call]


def norm_add(x: Tensor, residual: Tensor, scale: Tensor, eps: float) -> Tensor:
    """The residual with the RMS norm of x: [..., D] each."""
    return _NormAdd.apply(x, residual, scale, eps)  # type: ignore[no-untyped-call]


class _Add(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *addends: Tensor) -> Tensor:
        ctx.addends = len(addends)
        return add_all(x, addends)

    @staticmethod
    def backward(ctx: Any, d_total: Tensor) -> tuple[Tensor, ...]:
        return d_total, *[d_total] * ctx.addends


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, eps: float, *addends: Tensor) -> tuple[Tensor, Tensor]:
        if addends:
            total, normed = add_and_normalize(x, addends, scale, eps)
        else:
            total, normed = x.view_as(x), rms_norm(x, scale, eps)
        ctx.save_for_backward(total, scale)
        ctx.eps, ctx.addends = eps, len(addends)
        return total, normed

    @staticmethod
    def backward(ctx: Any, d_total: Tensor, d_normed: Tensor) -> tuple[Tensor | None, ...]:
        total, scale = ctx.saved_tensors
        d_x, d_scale = norm_gradients(total, scale, d_total, d_normed, ctx.eps)
        return d_x, d_scale, None, *[d_x] * ctx.addends


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
