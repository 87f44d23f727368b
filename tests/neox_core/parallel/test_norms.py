"""Norms of more numbers than one sum in fp32 can take, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from neox_core.parallel.norms import short_pieces


def norm(tensors: list[Tensor]) -> float:
    return float(torch.stack([piece.norm() for piece in short_pieces(tensors)]).norm())


@pytest.mark.parametrize("sizes", [(20_000_000,), (7, 3_000_001, 0, 1), (1 << 16,), (0,)])
def test_equals_float64(sizes: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(1)
    tensors = [torch.randn(size, generator=generator) for size in sizes]
    expected = sum(float(tensor.double().square().sum()) for tensor in tensors) ** 0.5
    assert norm(tensors) == pytest.approx(expected, rel=1e-6)


def test_pieces_are_the_tensors_in_order() -> None:
    tensors = [torch.arange(200_000.0), torch.zeros(3)]
    assert torch.equal(torch.cat(short_pieces(tensors)), torch.cat(tensors))
    assert all(piece.numel() < tensors[0].numel() for piece in short_pieces(tensors))
