"""FlexAttention within documents, in bf16 and fp32, against float64 on each document alone.

pytest -m gpu tests/gpu
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from neox_core.model.attention_kernel import causal_attention
from tests.neox_core.model import reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
LENGTHS = [[512], [1, 300, 130, 81]]


def alone(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    rows = []
    for row, lengths in enumerate(LENGTHS):
        parts = zip(*(x[row : row + 1].split(lengths, dim=1) for x in (q, k, v)), strict=True)
        rows.append(torch.cat([reference.causal_attention(*part) for part in parts], dim=1))
    return torch.cat(rows)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float32, 1e-2)])
@pytest.mark.parametrize(("heads", "kv_heads", "interleaved"), [(8, 8, False), (8, 8, True), (16, 2, False)])
def test_documents_as_if_alone(
    heads: int, kv_heads: int, interleaved: bool, dtype: torch.dtype, tolerance: float
) -> None:
    """Interleaved: a head's query, key and value lie next to each other, as after a rotation in place."""
    generator = torch.Generator().manual_seed(heads)
    sizes = (heads, kv_heads, kv_heads, heads)
    *qkv, upstream = [torch.randn(2, 512, n, 128, generator=generator).to("cuda", dtype) for n in sizes]
    inputs = [x.requires_grad_() for x in qkv]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    positions = torch.tensor([[place for n in row for place in range(n)] for row in LENGTHS], device="cuda")
    given = torch.stack(inputs, -2).unbind(-2) if interleaved else inputs
    output, expected = causal_attention(*given, positions), alone(*exact)
    output.backward(upstream)
    expected.backward(upstream.double())
    pairs = [(output.detach(), expected.detach()), *((x.grad, x64.grad) for x, x64 in zip(inputs, exact, strict=True))]
    for found, right in pairs:
        assert found is not None
        assert right is not None
        assert float((found.double() - right).abs().max() / right.abs().max()) < tolerance
