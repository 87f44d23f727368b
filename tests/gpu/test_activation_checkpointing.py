"""Activation checkpointing with compiled functions and the GPU's attention: gradients, and the planner's bytes.

pytest -m gpu tests/gpu
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from neox_core.config import ActivationCheckpointing, ParallelConfig, load_config
from neox_core.model import ModelDimensions, TransformerBlock
from neox_core.parallel.activation_checkpointing import checkpointing_of
from neox_core.parallel.layers import FusedBlock
from neox_core.parallel.weight_gradients import accept_accumulators
from neox_core.planning.activations import block_bytes
from tests.paths import CONFIGS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
TOKENS = 1024
DIMS = ModelDimensions(
    hidden_size=1024, num_heads=16, num_kv_heads=4, head_dim=64, intermediate_size=3072, vocab_size=64,
    rope_theta=1e4, norm_eps=1e-5, sequence_length=TOKENS,
)  # fmt: skip
"""Each result fills whole MiB, which is how the allocator gives large blocks."""


def run(mode: ActivationCheckpointing, dims: ModelDimensions) -> tuple[list[Tensor], int]:
    """Output and gradients of a block, and the bytes that it kept between forward and backward."""
    torch.manual_seed(0)
    plain = TransformerBlock(dims).to("cuda", torch.bfloat16)
    accept_accumulators(plain)
    block = FusedBlock(plain)
    block.checkpointing = checkpointing_of(mode)
    _step(block)  # compiles
    return _step(block)


def _step(block: FusedBlock) -> tuple[list[Tensor], int]:
    generator = torch.Generator("cuda").manual_seed(1)
    x = torch.randn(2, TOKENS, 1024, device="cuda", generator=generator).bfloat16().requires_grad_()
    block.zero_grad()
    before = torch.cuda.memory_allocated()
    y = block(x)
    kept = torch.cuda.memory_allocated() - before + x.nbytes - y.nbytes
    y.float().square().mean().backward()
    gradients = [p.grad for p in block.parameters()]
    return [y.detach(), *(g.clone() for g in (x.grad, *gradients) if g is not None)], kept


@pytest.mark.parametrize("kv_heads", [4, 16])
def test_gradients_agree_and_kept_bytes_are_the_planners(kv_heads: int) -> None:
    """With as many KV heads as heads, the fused projection is overwritten where nothing is computed again from it."""
    dims = replace(DIMS, num_kv_heads=kv_heads)
    config = load_config(CONFIGS / "toy.yml")
    train = config.train.model_copy(update={"precision": "bf16", "micro_batch_size": 2, "sequence_length": TOKENS})
    config = config.model_copy(update={"train": train, "parallel": ParallelConfig()})
    expected, _ = run("none", dims)
    modes: tuple[ActivationCheckpointing, ...] = ("none", "selective", "full")
    unplanned = {}
    for mode in modes:
        found, kept = run(mode, dims)
        unplanned[mode] = kept - block_bytes(config, dims, mode)
        for one, other in zip(found, expected, strict=True):
            # The norm is computed again from the rounded sum: within bf16.
            error = (one.float() - other.float()).abs().max() / other.float().abs().max()
            assert float(error) < 2e-2, mode
    for mode in modes:  # after all were measured: their differences are of use together
        assert abs(unplanned[mode]) <= 0.02 * block_bytes(config, dims, mode), unplanned
