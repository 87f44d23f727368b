"""Elementwise parts of the model. On GPUs each is one kernel forward and one backward, compiled or written by hand."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from inspect import signature
from typing import Any, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from neox_core.kernels.dispatch import Kernel

P = ParamSpec("P")
R = TypeVar("R")

_VARIANTS = 64
"""Kinds of arguments that a process may call a function with: dtypes, numbers of heads, with or without gradients.
Beyond torch's 8, a call would fail, and one process may train in several ways."""


def fused_on_cuda(function: Callable[P, R]) -> Kernel[P, R]:
    """Compile a function of tensors when its first argument is on a GPU; elsewhere a compiler may be missing."""

    @cache
    def compiled() -> Callable[P, R]:
        return compile_whole(function)

    def choose(*args: P.args, **kwargs: P.kwargs) -> R:
        first = args[0]
        assert isinstance(first, Tensor)
        return compiled()(*args, **kwargs) if first.is_cuda else function(*args, **kwargs)

    return Kernel(function, choose)


def compile_whole(function: Callable[P, R]) -> Callable[P, R]:
    """The function as kernels, for _VARIANTS kinds of arguments. Imports torch's compiler, for seconds."""
    limit: dict[str, Any] = {"recompile_limit": _VARIANTS}
    if "recompile_limit" not in signature(torch.compile).parameters:  # torch 2.11
        from torch._dynamo import config  # for all threads there; in later ones not for autograd's

        config.recompile_limit = max(config.recompile_limit, limit.pop("recompile_limit"))
    return torch.compile(function, fullgraph=True, **limit)


def _normalize(x: Tensor, scale: Tensor, eps: float, mean_square: Tensor | None = None) -> Tensor:
    x32 = x.float()
    if mean_square is None:
        mean_square = x32.square().mean(-1, keepdim=True)
    return scale * (x32 * torch.rsqrt(mean_square + eps)).to(x.dtype)


@fused_on_cuda
def rms_norm(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * scale over the last dimension, with the mean in fp32 (arXiv 1910.07467)."""
    return _normalize(x, scale, eps)


@fused_on_cuda
def add_all(x: Tensor, addends: tuple[Tensor, ...]) -> Tensor:
    """The sum of x and the addends."""
    return sum(addends, x)


@fused_on_cuda
def add_and_normalize(x: Tensor, addends: tuple[Tensor, ...], scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The sum of x and the addends, and its RMS norm."""
    total = sum(addends, x)
    return total, _normalize(total, scale, eps)


@fused_on_cuda
def normalize_and_add(x: Tensor, residual: Tensor, scale: Tensor, eps: float) -> Tensor:
    """The residual with the RMS norm of x."""
    return residual + _normalize(x, scale, eps)


@Kernel
def norm_gradients(
    x: Tensor, scale: Tensor, d_residual: Tensor | None, d_normed: Tensor, eps: float, total: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Gradients of an x that was normalized, and passed on as it is where d_residual is given; and of the scale.

    Args:
        total: fp32, to which the scale's gradient is added; None: it is returned.
    """
    if x.is_cuda:
        from neox_core.model.norm_kernel import launch

        return launch(x, scale, d_residual, d_normed, eps, total)
    x32, d32 = x.float(), d_normed.float()
    inverse = torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    unit, d_unit = x32 * inverse, d32 * scale.float()
    d_x = inverse * (d_unit - unit * (d_unit * unit).mean(-1, keepdim=True))
    if d_residual is not None:
        d_x = d_residual.float() + d_x
    d_scale = (d32 * unit.to(x.dtype)).flatten(0, -2).sum(0)
    if total is None:
        return d_x.to(x.dtype), d_scale.to(scale.dtype)
    total.add_(d_scale)
    return d_x.to(x.dtype), None


@fused_on_cuda
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (arXiv 2002.05202)."""
    return F.silu(gate) * up


def rotate(x_BTNH: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the two halves of each head by its position's angle (arXiv 2104.09864), in fp32; keeps the dtype.

    Args:
        cos, sin: fp32 [T, H/2], or [B, T, H/2] where sequences have positions of their own.
    """
    cos, sin = cos[..., None, :], sin[..., None, :]
    first, second = x_BTNH.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x_BTNH.dtype)


def _split(fused_BTF: Tensor, head_dim: int, heads: int, kv_heads: int, grouped: bool) -> tuple[Tensor, Tensor, Tensor]:
    rows = kv_heads if grouped else heads
    kv_slice = head_dim * kv_heads // rows
    per_head = fused_BTF.view(*fused_BTF.shape[:-1], rows, head_dim * heads // rows + 2 * kv_slice)
    q, k, v = torch.split(per_head, [head_dim * heads // rows, kv_slice, kv_slice], dim=-1)
    k, v = (x.reshape(*fused_BTF.shape[:-1], kv_heads, head_dim) for x in (k, v))
    return q.reshape(*fused_BTF.shape[:-1], heads, head_dim), k, v


@fused_on_cuda
def mean_squares(fused_BTF: Tensor, head_dim: int, heads: int, kv_heads: int, grouped: bool) -> Tensor:
    """Of all heads' queries and of all heads' keys in a fused projection: [B,T,2], in fp32."""
    return _mean_squares(*_split(fused_BTF, head_dim, heads, kv_heads, grouped)[:2])


def _mean_squares(q_BTNH: Tensor, k_BTKH: Tensor) -> Tensor:
    return torch.stack([x.float().square().mean((-2, -1)) for x in (q_BTNH, k_BTKH)], dim=-1)


def _normalize_heads(x_BTNH: Tensor, scale: Tensor, eps: float, mean_square: Tensor | None) -> Tensor:
    """Each head by its own mean square; by that of all where the scale is as wide, or by the one that is given."""
    head_dim = x_BTNH.shape[-1]
    if mean_square is None and len(scale) > head_dim:
        mean_square = x_BTNH.float().square().mean((-2, -1), keepdim=True)
    return _normalize(x_BTNH, scale.view(-1, head_dim), eps, mean_square)


def _split_and_rotate(
    fused_BTF: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    kv_heads: int,
    grouped: bool = False,
    scales: tuple[Tensor, Tensor] | None = None,
    eps: float = 0.0,
    means_BT2: Tensor | None = None,
    overwrite: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys with their positions, and values, from a fused projection.

    Args:
        fused_BTF: per query head its q, then its slices of k and of v, as NeoX has them; F = (heads + 2 kv_heads) x
            head width.
        grouped: instead, per KV head its queries, its k and its v.
        scales: of the norms that q and k get before they are rotated: [H], the same for each head, or of all heads.
        means_BT2: where they are normalized over all heads, and other ranks have some: mean squares of q and of k.
        overwrite: nobody else reads the fused projection, whose memory the results may be.

    Returns:
        q [B,T,heads,H], k and v [B,T,kv_heads,H], contiguous but for where they overwrite the fused projection.
    """
    head_dim = 2 * cos.shape[-1]
    q, k, v = _split(fused_BTF, head_dim, heads, kv_heads, grouped)
    if scales is not None:
        of_q, of_k = (None, None) if means_BT2 is None else means_BT2[..., None, None, :].unbind(-1)
        q, k = _normalize_heads(q, scales[0], eps, of_q), _normalize_heads(k, scales[1], eps, of_k)
    return rotate(q, cos, sin), rotate(k, cos, sin), v.contiguous()


_compiled_split_and_rotate = fused_on_cuda(_split_and_rotate)


def _split_and_rotate_on_device(
    fused_BTF: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int, grouped: bool = False,
    scales: tuple[Tensor, Tensor] | None = None, eps: float = 0.0, means_BT2: Tensor | None = None,
    overwrite: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if not fused_BTF.is_cuda or scales is not None:
        return _compiled_split_and_rotate(fused_BTF, cos, sin, heads, kv_heads, grouped, scales, eps, means_BT2)
    from neox_core.model.rotation_kernel import Heads, split_and_rotate

    return split_and_rotate(fused_BTF, cos, sin, Heads(2 * cos.shape[-1], heads, kv_heads, grouped), overwrite)


split_and_rotate = Kernel(_split_and_rotate, _split_and_rotate_on_device)
