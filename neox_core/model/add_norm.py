"""A residual addition and the norm after it, or before it, in one pass.

A residual stream that is added to, normalized and passed on is read and written once, and so is its gradient, which
autograd would sum in a pass of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from neox_core.model.elementwise import add_all, add_and_normalize, norm_gradients, normalize_and_add, rms_norm

Addends = tuple[Tensor, ...]
"""Tensors whose sum is meant, which nobody has made yet: the next pass over memory does. The first is of autograd's
graph, and its gradient is the sum's; the others may be outside of the graph."""


class ScaleAccumulator(Protocol):
    """Where a norm's scale has its gradient added up."""

    @property
    def buffer(self) -> Tensor:
        """fp32, in the scale's shape."""

    @property
    def on_gradient(self) -> Callable[[], None]:
        """Called after each addition."""


def add(x: Tensor, *addends: Tensor) -> Tensor:
    """The sum of x and the addends, of which there may be none: [..., D] each."""
    return _Add.apply(x, *addends) if addends else x  # type: ignore[no-untyped-call]


def add_norm(
    x: Tensor, addends: Addends, scale: Tensor, eps: float, accumulator: ScaleAccumulator | None = None
) -> tuple[Tensor, Tensor]:
    """The sum of x and the addends, of which there may be none, and the sum's RMS norm: [..., D] each.

    Args:
        accumulator: gets the scale's gradient; None: autograd does.
    """
    return _AddNorm.apply(x, scale, eps, accumulator, *addends)  # type: ignore[no-untyped-call]


def norm_add(
    x: Tensor, residual: Tensor, scale: Tensor, eps: float, accumulator: ScaleAccumulator | None = None
) -> Tensor:
    """The residual with the RMS norm of x: [..., D] each.

    Args:
        accumulator: gets the scale's gradient; None: autograd does.
    """
    return _NormAdd.apply(x, residual, scale, eps, accumulator)  # type: ignore[no-untyped-call]


def _gradients(ctx: Any, d_residual: Tensor | None, d_normed: Tensor) -> tuple[Tensor, Tensor | None]:
    x, scale = ctx.saved_tensors
    if ctx.accumulator is None:
        return norm_gradients(x, scale, d_residual, d_normed, ctx.eps)
    found = norm_gradients(x, scale, d_residual, d_normed, ctx.eps, ctx.accumulator.buffer)
    ctx.accumulator.on_gradient()
    return found


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
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, eps: float, accumulator: ScaleAccumulator | None, *addends: Tensor
    ) -> tuple[Tensor, Tensor]:
        if addends:
            total, normed = add_and_normalize(x, addends, scale, eps)
        else:
            total, normed = x.view_as(x), rms_norm(x, scale, eps)
        ctx.save_for_backward(total, scale)
        ctx.eps, ctx.accumulator, ctx.addends = eps, accumulator, len(addends)
        return total, normed

    @staticmethod
    def backward(ctx: Any, d_total: Tensor, d_normed: Tensor) -> tuple[Tensor | None, ...]:
        d_x, d_scale = _gradients(ctx, d_total, d_normed)
        return d_x, d_scale, None, None, *[d_x] * ctx.addends


class _NormAdd(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor, scale: Tensor, eps: float, accumulator: ScaleAccumulator | None
    ) -> Tensor:
        ctx.save_for_backward(x, scale)
        ctx.eps, ctx.accumulator = eps, accumulator
        return normalize_and_add(x, residual, scale, eps)

    @staticmethod
    def backward(ctx: Any, d_total: Tensor) -> tuple[Tensor | None, ...]:
        d_x, d_scale = _gradients(ctx, None, d_total)
        return d_x, d_total, d_scale, None, None
