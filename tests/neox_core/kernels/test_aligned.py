"""Where rows begin that cuBLAS can read quickly, and which columns are multiplied at a time."""

from __future__ import annotations

import pytest
import torch

from neox_core.kernels.aligned import aligned_rows, aligned_width, empty_rows, parts


@pytest.mark.parametrize(
    ("width", "expected"), [(8004, [(0, 8000), (8000, 8004)]), (8000, [(0, 8000)]), (8, [(0, 8)]), (3, [(0, 3)])]
)
def test_few_columns_are_multiplied_apart(width: int, expected: list[tuple[int, int]]) -> None:
    assert [(part.start, part.stop) for part in parts(width)] == expected


@pytest.mark.parametrize("width", [16, 9, 3])
@pytest.mark.parametrize("rows", [(5,), (2, 5), (3, 2, 5)])
def test_rows_begin_at_multiples_of_8(rows: tuple[int, ...], width: int) -> None:
    made = empty_rows(torch.zeros(1, dtype=torch.bfloat16), rows, width)
    assert made.shape == (*rows, width)
    assert made.dtype == torch.bfloat16
    flat = made.flatten(0, -2)
    assert flat.data_ptr() == made.data_ptr(), "a view"
    assert flat.stride() == (aligned_width(width), 1)
    assert aligned_width(width) % 8 == 0
    assert aligned_width(width) - width < 8
    assert made.is_contiguous() == (width == 16)


def test_only_what_is_not_aligned_is_copied() -> None:
    x, y = torch.randn(2, 4, 16), torch.randn(2, 4, 9)
    assert aligned_rows(x) is x
    copied = aligned_rows(y)
    assert torch.equal(copied, y)
    assert copied.stride() == (64, 16, 1)
    assert aligned_rows(copied) is copied
