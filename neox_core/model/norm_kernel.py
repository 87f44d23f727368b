"""Backward pass of RMSNorm and of its residual as one Triton kernel; see elementwise.py for what it computes.

A program takes every n-th row and keeps its part of the scale's gradient in registers, so that each tensor is read
once. A compiler makes two passes of it, since one sum runs over columns and the other over rows.
"""

# Triton reads a kernel's annotations when it compiles, so they must not be strings.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

_PROGRAMS_PER_PROCESSOR = 2
_COLUMNS = 32
"""Of the parts of the scale's gradient that a program adds up."""


def launch(
    x: Tensor, scale: Tensor, d_residual: Tensor | None, d_normed: Tensor, eps: float, total: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Gradients of x [..., D] and of the scale [D], which is added to the total, fp32, where one is given."""
    width = x.shape[-1]
    rows = x.numel() // width
    d_normed = d_normed.contiguous()
    added = d_normed if d_residual is None else d_residual.contiguous()  # d_normed is not read as such
    programs = min(rows, _PROGRAMS_PER_PROCESSOR * torch.cuda.get_device_properties(x.device).multi_processor_count)
    d_x, parts = torch.empty_like(x), torch.empty(programs, width, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(width)
    warps = min(max(block // 1024, 4), 16)
    _rms_norm_backward[(programs,)](
        x, scale, added, d_normed, d_x, parts, rows, width, eps, programs,
        ADDS=d_residual is not None, BLOCK=block, num_warps=warps,
    )  # fmt: skip
    if total is None:
        return d_x, parts.sum(0).to(scale.dtype)
    _add_rows[(triton.cdiv(width, _COLUMNS),)](parts, total, programs, width, ROWS=64, COLUMNS=_COLUMNS)
    return d_x, None


@triton.jit
def _rms_norm_backward(
    x, scale, d_residual, d_normed, d_x, parts, rows, width, eps, programs, ADDS: tl.constexpr, BLOCK: tl.constexpr
):
    first = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    weight = tl.load(scale + columns, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for row in tl.range(first, rows, programs, num_stages=2):
        at = row.to(tl.int64) * width + columns
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        upstream = tl.load(d_normed + at, mask=inside, other=0.0).to(tl.float32)
        inverse = tl.rsqrt(tl.sum(value * value) / width + eps)
        unit = value * inverse
        d_unit = upstream * weight
        gradient = inverse * (d_unit - unit * (tl.sum(d_unit * unit) / width))
        if ADDS:
            gradient += tl.load(d_residual + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(d_x + at, gradient.to(d_x.dtype.element_ty), mask=inside)
        total += upstream * unit.to(d_x.dtype.element_ty).to(tl.float32)
    tl.store(parts + first.to(tl.int64) * width + columns, total, mask=inside)


@triton.jit
def _add_rows(parts, total, rows, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < width
    found = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for first in range(0, rows, ROWS):
        row = first + tl.arange(0, ROWS)
        at = row[:, None] * width + columns[None, :]
        found += tl.load(parts + at, mask=(row < rows)[:, None] & inside[None, :], other=0.0)
    before = tl.load(total + columns, mask=inside, other=0.0)
    tl.store(total + columns, before + tl.sum(found, axis=0), mask=inside)
