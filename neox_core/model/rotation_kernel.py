"""Split and rotation of the fused projection as one Triton kernel; see elementwise.py for what it computes.

A pair of numbers that are rotated together is read and written once. A compiler makes each of the two by itself, from
both, and copies the values in a pass of their own.
"""

# Triton reads a kernel's annotations when it compiles, so they must not be strings.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Heads(NamedTuple):
    """How a row of the fused projection is made up."""

    width: int
    """Of a head."""
    queries: int
    keys: int
    """Heads of keys, and of values."""
    grouped: bool
    """A part of the row is a KV head with its queries; otherwise a query head with its slices of a KV head."""

    @property
    def parts(self) -> int:
        """Of which a row is made up, one after the other."""
        return self.keys if self.grouped else self.queries


def split_and_rotate(
    fused_BTF: Tensor, cos: Tensor, sin: Tensor, heads: Heads, overwrite: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """See elementwise.py.

    Args:
        overwrite: the fused projection may become its queries, keys and values, as it does where these are as many.
    """
    overwrite = overwrite and heads.queries == heads.keys
    return _SplitAndRotate.apply(fused_BTF, cos, sin, heads, overwrite)  # type: ignore[no-untyped-call]


class _SplitAndRotate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, fused_BTF: Tensor, cos: Tensor, sin: Tensor, heads: Heads, overwrite: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        ctx.heads, ctx.shape = heads, fused_BTF.shape
        fused_BTF = fused_BTF.detach().contiguous()
        made = _views(fused_BTF, heads) if overwrite else _separate(fused_BTF, heads)
        _launch(fused_BTF, made, cos, sin, heads, overwrite=overwrite)
        if overwrite and not fused_BTF.is_inference():
            torch.autograd.graph.increment_version(fused_BTF)  # so that whoever has kept it is told
        return made

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        q, k, v = (gradient.contiguous() for gradient in gradients)
        fused_BTF = q.new_empty(ctx.shape)
        _launch(fused_BTF, (q, k, v), cos, sin, ctx.heads, backward=True)
        return fused_BTF, None, None, None, None


def _separate(fused_BTF: Tensor, heads: Heads) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (
        fused_BTF.new_empty(*fused_BTF.shape[:-1], number, heads.width)
        for number in (heads.queries, heads.keys, heads.keys)
    )
    return q, k, v


def _views(fused_BTF: Tensor, heads: Heads) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = fused_BTF.view(*fused_BTF.shape[:-1], heads.parts, 3, heads.width).unbind(-2)
    return q, k, v


def _launch(
    fused_BTF: Tensor,
    separate: tuple[Tensor, Tensor, Tensor],
    cos: Tensor,
    sin: Tensor,
    heads: Heads,
    backward: bool = False,
    overwrite: bool = False,
) -> None:
    width = heads.width
    pairs = heads.queries * width // 2
    _rotate[(fused_BTF.numel() // fused_BTF.shape[-1],)](
        fused_BTF, *separate, cos, sin, cos.numel() // cos.shape[-1],
        HALF=width // 2, QUERIES=heads.queries, KEYS=heads.keys, PARTS=heads.parts,
        BACKWARD=backward, OVERWRITE=overwrite,
        PAIRS=triton.next_power_of_2(pairs), KEY_PAIRS=triton.next_power_of_2(heads.keys * width // 2),
        num_warps=min(max(pairs // 256, 1), 8),
    )  # fmt: skip


@triton.jit
def _rotate(
    fused, q, k, v, cos, sin, positions,
    HALF: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, PARTS: tl.constexpr,
    BACKWARD: tl.constexpr, OVERWRITE: tl.constexpr, PAIRS: tl.constexpr, KEY_PAIRS: tl.constexpr,
):  # fmt: skip
    """One token: its queries, then keys, then values."""
    token = tl.program_id(0).to(tl.int64)
    q_part: tl.constexpr = QUERIES * 2 * HALF // PARTS
    kv_part: tl.constexpr = KEYS * 2 * HALF // PARTS
    part: tl.constexpr = q_part + 2 * kv_part
    fused += token * (PARTS * part)
    cos += token % positions * HALF
    sin += token % positions * HALF
    q += token * (QUERIES * 2 * HALF)
    k += token * (KEYS * 2 * HALF)
    v += token * (KEYS * 2 * HALF)
    _move(fused, q, cos, sin, HALF, QUERIES, q_part, part, 0, PAIRS, True, BACKWARD, OVERWRITE)
    _move(fused, k, cos, sin, HALF, KEYS, kv_part, part, q_part, KEY_PAIRS, True, BACKWARD, OVERWRITE)
    if not OVERWRITE:
        _move(fused, v, cos, sin, HALF, KEYS, kv_part, part, q_part + kv_part, KEY_PAIRS, False, BACKWARD, OVERWRITE)


@triton.jit
def _move(
    fused, heads, cos, sin,
    HALF: tl.constexpr, NUMBER: tl.constexpr, OF_PART: tl.constexpr, PART: tl.constexpr, START: tl.constexpr,
    PAIRS: tl.constexpr, ROTATES: tl.constexpr, BACKWARD: tl.constexpr, OVERWRITE: tl.constexpr,
):  # fmt: skip
    """Heads of a kind, between the fused row, where START begins those of a part, and a row of their own."""
    pair = tl.arange(0, PAIRS)
    inside = pair < NUMBER * HALF
    at = pair % HALF
    first = pair // HALF * (2 * HALF) + at
    second = first + HALF
    fused_first = first // OF_PART * PART + START + first % OF_PART
    fused_second = second // OF_PART * PART + START + second % OF_PART
    if BACKWARD:
        x = tl.load(heads + first, mask=inside, other=0.0)
        y = tl.load(heads + second, mask=inside, other=0.0)
    else:
        x = tl.load(fused + fused_first, mask=inside, other=0.0)
        y = tl.load(fused + fused_second, mask=inside, other=0.0)
    if ROTATES:
        cosine = tl.load(cos + at)
        sine = tl.load(sin + at)
        if BACKWARD:
            sine = -sine
        a, b = x.to(tl.float32), y.to(tl.float32)
        x = (a * cosine - b * sine).to(x.dtype)
        y = (b * cosine + a * sine).to(x.dtype)
    if BACKWARD or OVERWRITE:
        tl.store(fused + fused_first, x, mask=inside)
        tl.store(fused + fused_second, y, mask=inside)
    else:
        tl.store(heads + first, x, mask=inside)
        tl.store(heads + second, y, mask=inside)
