"""Products with matrices whose width is not a multiple of 8, as the part of a vocabulary that a rank has may be.

cuBLAS multiplies those by kernels made for Ampere, a third as fast on an H200 (docs/lab-diary.md). It has others where
rows begin at multiples of 16 bytes and a product's dimensions are multiples of 8. So the rows of such a matrix have
some room after them, and the columns up to the last multiple of 8 are multiplied apart from the few that are left.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

WIDTH = 8


def parts(width: int) -> list[slice]:
    """The columns to be multiplied at a time: all, or those up to the last multiple of 8, and those that are left."""
    even = width - width % WIDTH
    return [part for part in (slice(0, even), slice(even, width)) if part.start < part.stop]


def empty_rows(like: Tensor, rows: Sequence[int], width: int) -> Tensor:
    """[*rows, width] without values, whose rows begin at multiples of 8."""
    strides = [aligned_width(width)]
    for size in reversed(rows[1:]):
        strides.insert(0, strides[0] * size)
    return like.new_empty_strided((*rows, width), (*strides, 1))


def aligned_width(width: int) -> int:
    """From one row to the next."""
    return width + -width % WIDTH


def aligned_rows(x: Tensor) -> Tensor:
    """x, or where its width is no multiple of 8, a copy of it whose rows begin at such multiples."""
    if x.shape[-1] % WIDTH == 0 or x.stride(-2) % WIDTH == 0:
        return x
    return empty_rows(x, x.shape[:-1], x.shape[-1]).copy_(x)
