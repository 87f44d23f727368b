"""Weight gradients that the matrix product adds straight to fp32 buffers.

A linear layer's own backward pass yields a bf16 gradient, which then is converted and added to the fp32 accumulator:
three passes over memory per micro batch, and a rounding to bf16 before the sum. Here the product accumulates in place.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _AccumulatingLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, accumulator: Tensor, on_gradient: Callable[[], None]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.accumulator, ctx.on_gradient = accumulator, on_gradient
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        x, weight = ctx.saved_tensors
        add_outer_product(ctx.accumulator, gradient.flatten(0, -2), x.flatten(0, -2))
        ctx.on_gradient()
        return gradient @ weight, None, None, None


def add_outer_product(accumulator: Tensor, gradient_MO: Tensor, x_MI: Tensor) -> None:
    """accumulator [O,I] += gradient^T x, with products and sums in fp32."""
    if accumulator.is_cuda and x_MI.dtype != torch.float32:
        torch.ops.aten.addmm.dtype_out(
            accumulator, gradient_MO.t(), x_MI, torch.float32, beta=1, alpha=1, out=accumulator
        )
    else:
        accumulator.addmm_(gradient_MO.t().float(), x_MI.float())


def accumulate_in(linear: nn.Linear, accumulator: Tensor, on_gradient: Callable[[], None]) -> None:
    """Let a linear layer without bias add its weight gradient to `accumulator`; `weight.grad` stays None.

    Args:
        accumulator: fp32, in the weight's shape.
        on_gradient: called after each addition.
    """
    assert linear.bias is None, "a bias gradient would be lost"

    def forward(x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return F.linear(x, linear.weight)
        return _AccumulatingLinear.apply(x, linear.weight, accumulator, on_gradient)

    linear.forward = forward


def accumulate_linear_gradients(module: nn.Module, optimizer: Any) -> None:
    """Let every linear layer of a module add its weight gradient to DeepSpeed's fp32 accumulators.

    Args:
        optimizer: DeepSpeed's BF16_Optimizer, which owns the accumulators. It skips those without its mark.
    """
    places = {id(p): (g, i) for g, group in enumerate(optimizer.bf16_groups) for i, p in enumerate(group)}
    for linear in module.modules():
        if isinstance(linear, nn.Linear):
            group, index = places[id(linear.weight)]
            accumulator = optimizer.fp32_groups_gradients[group][index].view(linear.weight.shape)
            accumulate_in(linear, accumulator, partial(_mark, optimizer, group, index))


def _mark(optimizer: Any, group: int, index: int) -> None:
    optimizer.fp32_groups_has_gradients[group][index] = True
