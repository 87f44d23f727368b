"""Additions joined with norms, against the block's own forward in float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from neox_core.model import ModelDimensions, TransformerBlock
from neox_core.model.llama import RMSNorm
from neox_core.parallel.layers import FusedBlock
from neox_core.parallel.weight_gradients import accept_accumulators


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize(
    "differences",
    [
        pytest.param({}, id="llama"),
        pytest.param({"layers_without_rope": (0,)}, id="no rotation"),
        pytest.param({"qkv_bias": True}, id="bias"),
        pytest.param({"qkv_bias": True, "output_bias": True}, id="biases"),
        pytest.param({"qk_norm": "head"}, id="norm of each head"),
        pytest.param({"qk_norm": "projection", "norms_after": True}, id="norms of projections, norms after"),
    ],
)
def test_output_and_every_gradient_are_those_of_the_plain_block(
    differences: dict[str, Any], device: str, dtype: torch.dtype, tolerance: float
) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    torch.manual_seed(0)
    dims = ModelDimensions(
        hidden_size=64, num_heads=4, num_kv_heads=2, head_dim=16, intermediate_size=96, vocab_size=8,
        rope_theta=1e4, norm_eps=1e-5, sequence_length=32, **differences,
    )  # fmt: skip
    block = TransformerBlock(dims.of_layer(0))
    for module in block.modules():
        if isinstance(module, RMSNorm):
            torch.nn.init.uniform_(module.scale, 0.5, 1.5)
    block, x = block.to(dtype), torch.randn(2, 32, 64).to(dtype)
    plain, x64 = copy.deepcopy(block).double(), x.double().requires_grad_()
    accept_accumulators(block)
    fused, x = FusedBlock(block.to(device)), x.to(device).requires_grad_()
    upstream = torch.randn(2, 32, 64).to(dtype)

    output, expected = fused(x), plain(x64)
    output.backward(upstream.to(device))
    expected.backward(upstream.double())

    found = {"output": output, "x": x.grad, **{name: p.grad for name, p in fused.named_parameters()}}
    exact = {"output": expected, "x": x64.grad, **{name: p.grad for name, p in plain.named_parameters()}}
    for name, tensor in exact.items():
        difference = (found[name].detach().cpu().double() - tensor.detach()).abs().max()
        assert difference <= tolerance * tensor.detach().abs().max(), name
