"""What runs differently on a GPU, against float64 on the same numbers. Needs torch, numpy, pytest and this repository.

pytest -m gpu tests/gpu
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from neox_core.model import ModelDimensions, TransformerBlock
from neox_core.model.attention_kernel import causal_attention
from neox_core.model.elementwise import norm_gradients, split_and_rotate
from neox_core.model.rope import rope_tables
from neox_core.parallel.loss import IGNORE_INDEX, logit_gradients, losses_of_parts, softmax_part, token_losses
from tests.neox_core.model import reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

HEADS = [(8, 8), (16, 2)]
"""Query heads and KV heads: multi-head and grouped."""
BF16_TOLERANCE = 2e-2
"""Of the largest entry: bf16 has 8 significant bits, and a kernel rounds inputs of its second product too."""


def needs(module: str, name: str) -> pytest.MarkDecorator:
    """Skip where the module lacks the name or cannot be imported."""
    try:
        missing = not hasattr(importlib.import_module(module), name)
    except ImportError:
        missing = True
    return pytest.mark.skipif(missing, reason=f'{module} is not installed (the extra "gpu")')


def random_qkv(heads: int, kv_heads: int, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """q, k, v [2, 256, heads, 128] and a gradient of the output."""
    generator = torch.Generator().manual_seed(heads)
    inputs = [torch.randn(2, 256, n, 128, generator=generator) for n in (heads, kv_heads, kv_heads, heads)]
    *qkv, upstream = (x.to("cuda", dtype) for x in inputs)
    return [x.requires_grad_() for x in qkv], upstream


def largest_error(found: Tensor | None, expected: Tensor | None) -> float:
    """Relative to the largest expected entry."""
    assert found is not None
    assert expected is not None
    assert bool(found.isfinite().all())
    return float((found.detach().double() - expected).abs().max() / expected.abs().max())


BACKENDS = [
    "cudnn",
    "sdpa",
    pytest.param("flash_attn", marks=needs("flash_attn", "flash_attn_func")),
    pytest.param("flash_attn_4", marks=needs("flash_attn.cute", "flash_attn_func")),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
def test_attention_in_bf16(heads: int, kv_heads: int, backend: str) -> None:
    check_attention(heads, kv_heads, torch.bfloat16, BF16_TOLERANCE, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_of_a_projection_that_was_rotated_in_place(backend: str) -> None:
    """A head's query, key and value lie next to each other."""
    check_attention(8, 8, torch.bfloat16, BF16_TOLERANCE, backend, interleaved=True)


@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
def test_attention_in_fp32(heads: int, kv_heads: int) -> None:
    check_attention(heads, kv_heads, torch.float32, 1e-4, "auto")


def check_attention(
    heads: int, kv_heads: int, dtype: torch.dtype, tolerance: float, backend: str, interleaved: bool = False
) -> None:
    """Output and gradients."""
    inputs, upstream = random_qkv(heads, kv_heads, dtype)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    given = torch.stack(inputs, -2).unbind(-2) if interleaved else inputs
    output, expected = causal_attention(*given, backend=backend), reference.causal_attention(*exact)
    assert output.dtype == dtype
    assert largest_error(output, expected.detach()) < tolerance
    output.backward(upstream)
    expected.backward(upstream.double())
    for x, x64 in zip(inputs, exact, strict=True):
        assert largest_error(x.grad, x64.grad) < tolerance


@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
def test_block_in_bf16_is_the_block_in_fp32_on_the_cpu(heads: int, kv_heads: int) -> None:
    """Norms, RoPE and MLP too; the CPU's block is compared with transformers in tests/neox_core/model."""
    dims = ModelDimensions(
        hidden_size=512, num_heads=heads, num_kv_heads=kv_heads, head_dim=64, intermediate_size=1024, vocab_size=64,
        rope_theta=1e6, norm_eps=1e-5, sequence_length=512,
    )  # fmt: skip
    torch.manual_seed(heads)
    block = TransformerBlock(dims).bfloat16()
    x = torch.randn(2, 512, 512).bfloat16()
    expected = block.float()(x.float())
    block.bfloat16().to("cuda")
    cos, _ = rope_tables(64, 512, 1e6)
    assert torch.equal(block.attention.rotary.cos.cpu(), cos)
    output = block(x.cuda())
    assert output.dtype == torch.bfloat16
    assert largest_error(output.cpu(), expected.detach().double()) < BF16_TOLERANCE


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[dist.ProcessGroup]:
    """An NCCL group of this process alone."""
    dist.init_process_group("nccl", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    group = dist.group.WORLD
    assert group is not None
    yield group
    dist.destroy_process_group()


LOSSES = [(1.0, 0.0), (1e4, 0.0), (1.0, 0.01)]
"""Sizes of logits, and the z-loss."""


def random_logits(scale: float) -> tuple[Tensor, Tensor]:
    """bf16 [2,64,1000], with targets of which some are ignored."""
    generator = torch.Generator().manual_seed(1)
    logits = (scale * torch.randn(2, 64, 1000, generator=generator)).to("cuda", torch.bfloat16)
    targets = torch.randint(1000, (2, 64), generator=generator).cuda()
    targets[0, :7] = IGNORE_INDEX
    return logits, targets


def check_losses(logits: Tensor, targets: Tensor, z_loss: float, losses: Tensor, gradient: Tensor | None) -> None:
    """Against float64; the gradient is that of the losses' sum."""
    exact = logits.detach().double().requires_grad_()
    expected = torch.nn.functional.cross_entropy(
        exact.flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="none"
    )
    torch.testing.assert_close(losses.flatten().double(), expected, rtol=1e-5, atol=1e-4)
    squares = exact.logsumexp(-1).square() * (targets != IGNORE_INDEX)
    (expected.sum() + z_loss * squares.sum()).backward()
    assert largest_error(gradient, exact.grad) < 2**-8


@pytest.mark.parametrize(("scale", "z_loss"), LOSSES)
def test_token_losses_of_bf16_logits(one_rank: dist.ProcessGroup, scale: float, z_loss: float) -> None:
    logits, targets = random_logits(scale)
    losses = token_losses(logits.requires_grad_(), targets, one_rank, 0, z_loss)
    losses.sum().backward()
    check_losses(logits, targets, z_loss, losses, logits.grad)


@pytest.mark.parametrize(("scale", "z_loss"), LOSSES)
def test_losses_of_a_split_vocabulary(scale: float, z_loss: float) -> None:
    """As tensor-parallel ranks compute them, each with a quarter of the logits."""
    logits, targets = random_logits(scale)
    shares = [(share.contiguous(), targets - 250 * rank) for rank, share in enumerate(logits.chunk(4, dim=-1))]
    parts = torch.stack([softmax_part(*share) for share in shares])
    losses, *softmax = losses_of_parts(parts, targets)
    upstream = torch.ones_like(losses)
    gradients = [logit_gradients(*share, targets, *softmax, upstream, z_loss) for share in shares]
    check_losses(logits, targets, z_loss, losses, torch.cat(gradients, dim=-1))


PROJECTIONS = [(8, 8, False, 128), (8, 8, True, 64), (16, 2, False, 128), (16, 2, True, 128), (6, 3, False, 40)]
"""Query heads, KV heads, whether they lie in groups, and their width."""


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("own_positions", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("heads", "kv_heads", "grouped", "width"), PROJECTIONS)
def test_split_and_rotation(
    heads: int, kv_heads: int, grouped: bool, width: int, dtype: torch.dtype, own_positions: bool, overwrite: bool
) -> None:
    """Against the plain function on a CPU."""
    generator = torch.Generator().manual_seed(heads)
    cos, sin = rope_tables(width, 50, 1e4)
    if own_positions:
        cos, sin = (torch.stack([x, x.flip(0)]) for x in (cos, sin))
    fused = torch.randn(2, 50, (heads + 2 * kv_heads) * width, generator=generator).to(dtype)
    sizes = (heads, kv_heads, grouped)
    plain = fused.float().clone().requires_grad_()
    expected = split_and_rotate.function(plain, cos, sin, *sizes)
    upstream = [torch.randn(x.shape, generator=generator).to(dtype) for x in expected]
    torch.autograd.backward(expected, [x.float() for x in upstream])

    leaf = fused.cuda().requires_grad_()
    projected = leaf * 1  # what may be overwritten is no leaf
    found = split_and_rotate(projected, cos.cuda(), sin.cuda(), *sizes, overwrite=overwrite)
    rounding = 2**-8 if dtype == torch.bfloat16 else 1e-6
    for x, of_cpu in zip(found, expected, strict=True):
        assert largest_error(x.cpu(), of_cpu.detach().double()) < rounding
    assert torch.equal(found[2].cpu().float(), expected[2])
    shares = [x.untyped_storage().data_ptr() == projected.untyped_storage().data_ptr() for x in found]
    assert shares == [overwrite and heads == kv_heads] * 3
    torch.autograd.backward(found, [x.cuda() for x in upstream])
    assert plain.grad is not None
    assert leaf.grad is not None
    assert largest_error(leaf.grad.cpu(), plain.grad.double()) < rounding
    if not overwrite:
        assert torch.equal(projected.cpu(), fused)


@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize(("rows", "width"), [(1, 8), (37, 1000), (5000, 4096), (300, 8192)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gradients_of_a_norm(dtype: torch.dtype, rows: int, width: int, adds: bool) -> None:
    """Against float64; added to what is there, in place of being rounded and returned."""
    generator = torch.Generator().manual_seed(rows)
    x, d_residual, d_normed = (torch.randn(rows, width, generator=generator).to(dtype) for _ in range(3))
    scale, before = (torch.randn(width, generator=generator) for _ in range(2))
    scale = scale.to(dtype)
    x64, scale64 = x.double().requires_grad_(), scale.double().requires_grad_()
    normed = scale64 * x64 * torch.rsqrt(x64.square().mean(-1, keepdim=True) + 1e-5)
    torch.autograd.backward(normed, d_normed.double())
    assert x64.grad is not None
    assert scale64.grad is not None
    d_x64 = x64.grad + d_residual.double() if adds else x64.grad

    on_gpu = [t.cuda() for t in (x, scale, d_residual, d_normed, before)]
    x, scale, d_residual, d_normed, total = on_gpu
    residual = d_residual if adds else None
    rounding = 2**-7 if dtype == torch.bfloat16 else 1e-5  # what was normalized is rounded, and then its product
    d_x, d_scale = norm_gradients(x, scale, residual, d_normed, 1e-5)
    assert largest_error(d_x.cpu(), d_x64) < rounding
    assert d_scale is not None
    assert largest_error(d_scale.cpu(), scale64.grad) < rounding
    again, nothing = norm_gradients(x, scale, residual, d_normed, 1e-5, total)
    assert nothing is None
    assert torch.equal(again, d_x)
    assert largest_error(total.cpu(), before.double() + scale64.grad) < rounding
