"""Documents packed into a row: as if each were alone, against the float64 reference on each alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from neox_core.model import ModelDimensions, TransformerBlock
from neox_core.model.attention_kernel import causal_attention
from neox_core.model.document_attention import dense_mask
from neox_core.model.elementwise import rotate
from neox_core.model.rope import RotaryEmbedding
from tests.neox_core.model import reference

LENGTHS = [[17], [5, 1, 11], [1, 1, 15]]
"""Lengths of the documents in each row; the first row is one document."""
POSITIONS = torch.tensor([[position for length in row for position in range(length)] for row in LENGTHS])
HEADS = [(4, 4), (8, 2), (6, 1)]


def documents(x: Tensor) -> list[Tensor]:
    """[B,T,...] -> each document alone, [1,length,...]."""
    return [part for row, lengths in zip(x, LENGTHS, strict=True) for part in row[None].split(lengths, dim=1)]


def packed(parts: list[Tensor]) -> Tensor:
    """The reverse of `documents`."""
    return torch.cat(parts, dim=1).view(len(LENGTHS), 17, *parts[0].shape[2:])


@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
def test_attention_and_gradients_are_those_of_each_document_alone(heads: int, kv_heads: int) -> None:
    generator = torch.Generator().manual_seed(heads)
    inputs = [torch.randn(3, 17, n, 16, generator=generator, requires_grad=True) for n in (heads, kv_heads, kv_heads)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    output = causal_attention(*inputs, POSITIONS)
    alone = zip(*(documents(x) for x in exact), strict=True)
    expected = packed([reference.causal_attention(q, k, v) for q, k, v in alone])
    torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-6)
    upstream = torch.randn(output.shape, generator=generator)
    output.backward(upstream)
    expected.backward(upstream.double())
    for x, x64 in zip(inputs, exact, strict=True):
        assert x.grad is not None
        torch.testing.assert_close(x.grad.double(), x64.grad, rtol=1e-5, atol=1e-5)


def test_mask_against_loops() -> None:
    number = [[index for index, length in enumerate(row) for _ in range(length)] for row in LENGTHS]
    expected = [
        [[key <= query and row[key] == row[query] for key in range(17)] for query in range(17)] for row in number
    ]
    assert dense_mask(POSITIONS).tolist() == [[rows] for rows in expected]
    assert dense_mask(POSITIONS) is dense_mask(POSITIONS)  # made once for all layers
    other = torch.arange(17).expand(3, 17)
    assert not torch.equal(dense_mask(other), dense_mask(POSITIONS))


def test_rotary_positions_restart() -> None:
    x = torch.randn(3, 17, 4, 16, generator=torch.Generator().manual_seed(1))
    rotated = rotate(x, *RotaryEmbedding(16, 32, 1e4)(17, POSITIONS))
    expected = packed([reference.rotate(part, 1e4) for part in documents(x)])
    torch.testing.assert_close(rotated.double(), expected, rtol=1e-5, atol=1e-6)


def test_block_is_the_block_of_each_document_alone() -> None:
    dims = ModelDimensions(
        hidden_size=48, num_heads=4, num_kv_heads=2, head_dim=16, intermediate_size=64, vocab_size=32, rope_theta=1e4,
        norm_eps=1e-5, sequence_length=32,
    )  # fmt: skip
    torch.manual_seed(2)
    block = TransformerBlock(dims)
    x = torch.randn(3, 17, 48)
    output = block(x, POSITIONS)
    torch.testing.assert_close(output, packed([block(part) for part in documents(x)]), rtol=1e-5, atol=1e-5)
    assert (output - block(x)).abs().max() > 0.01
