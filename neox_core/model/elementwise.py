"""Elementwise parts of the model. On GPUs each is compiled into one kernel forward and one backward."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def fused_on_cuda(function: Callable[P, R]) -> Callable[P, R]:
    """Compile a function of tensors when its first argument is on a GPU; elsewhere a compiler may be missing."""
    compiled = torch.compile(function, fullgraph=True)

    @wraps(function)
    def choose(*args: P.args, **kwargs: P.kwargs) -> R:
        first = args[0]
        assert isinstance(first, Tensor)
        return compiled(*args, **kwargs) if first.is_cuda else function(*args, **kwargs)

    return choose


@fused_on_cuda
def rms_norm(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * scale over the last dimension, with the mean in fp32 (arXiv 1910.07467)."""
    x32 = x.float()
    normalized = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    return scale * normalized.to(x.dtype)


@fused_on_cuda
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (arXiv 2002.05202)."""
    return F.silu(gate) * up


@fused_on_cuda
def rotate(x_BTNH: Tensor, cos_TH: Tensor, sin_TH: Tensor) -> Tensor:
    """Rotate the two halves of each head by its position's angle (arXiv 2104.09864), in fp32; keeps the dtype.

    Args:
        cos_TH, sin_TH: fp32, half a head wide.
    """
    cos, sin = cos_TH[:, None], sin_TH[:, None]
    first, second = x_BTNH.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x_BTNH.dtype)
