"""Attention against a float64 reference, and NeoX's fused projection against its description."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from neox_core.model import ModelDimensions
from neox_core.model.attention_kernel import causal_attention
from neox_core.model.elementwise import split_and_rotate
from neox_core.model.llama import Attention
from tests.neox_core.model import reference

HEADS = [(4, 4), (8, 2), (6, 1)]
"""Query heads and KV heads: multi-head, grouped, multi-query."""


def dimensions(heads: int, kv_heads: int, head_dim: int = 16) -> ModelDimensions:
    return ModelDimensions(
        hidden_size=48, num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim, intermediate_size=64,
        vocab_size=32, rope_theta=1e4, norm_eps=1e-5, sequence_length=32,
    )  # fmt: skip


def random_qkv(heads: int, kv_heads: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(heads)
    shapes = [(2, 17, count, 16) for count in (heads, kv_heads, kv_heads)]
    return [torch.randn(shape, generator=generator, dtype=dtype, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
def test_causal_attention_and_its_gradients(heads: int, kv_heads: int) -> None:
    inputs = random_qkv(heads, kv_heads)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    output, expected = causal_attention(*inputs), reference.causal_attention(*exact)
    assert output.shape == inputs[0].shape
    torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-6)
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    output.backward(upstream)
    expected.backward(upstream.double())
    for x, x64 in zip(inputs, exact, strict=True):
        assert x.grad is not None
        torch.testing.assert_close(x.grad.double(), x64.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("heads", "kv_heads"), HEADS[:2])
def test_projection_reads_neox_fused_rows(heads: int, kv_heads: int) -> None:
    dims = dimensions(heads, kv_heads)
    generator = torch.Generator().manual_seed(heads)
    query, key, value = (torch.randn(n * 16, 48, generator=generator) for n in (heads, kv_heads, kv_heads))
    attention = Attention(dims)
    attention.load_state_dict(
        {
            "query_key_value.weight": reference.fuse_qkv(query, key, value, heads, kv_heads),
            "dense.weight": torch.zeros(48, heads * 16),
        }
    )
    x = torch.randn(2, 5, 48, generator=generator)
    nowhere = torch.ones(5, 8), torch.zeros(5, 8)  # a rotation by no angle
    q, k, v = split_and_rotate(attention.query_key_value(x), *nowhere, heads, kv_heads)
    for projected, weight in ((q, query), (k, key), (v, value)):
        assert projected.shape == (2, 5, weight.shape[0] // 16, 16)
        torch.testing.assert_close(projected.flatten(2), x @ weight.T)


@pytest.mark.parametrize(("heads", "kv_heads"), HEADS[:2])
def test_attention_module_in_float64(heads: int, kv_heads: int) -> None:
    """Projection, rotation (of q and k, not of v), attention and output projection together."""
    generator = torch.Generator().manual_seed(heads)
    query, key, value = (torch.randn(n * 16, 48, generator=generator) / 7 for n in (heads, kv_heads, kv_heads))
    dense = torch.randn(48, heads * 16, generator=generator) / 7
    attention = Attention(dimensions(heads, kv_heads))
    fused = reference.fuse_qkv(query, key, value, heads, kv_heads)
    attention.load_state_dict({"query_key_value.weight": fused, "dense.weight": dense})
    x = torch.randn(2, 32, 48, generator=generator)
    q, k, v = ((x.double() @ w.double().T).unflatten(-1, (-1, 16)) for w in (query, key, value))
    expected = reference.causal_attention(reference.rotate(q, 1e4), reference.rotate(k, 1e4), v)
    torch.testing.assert_close(attention(x).double(), expected.flatten(2) @ dense.double().T, rtol=1e-4, atol=1e-5)
