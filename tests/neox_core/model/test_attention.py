"""Attention against a float64 reference, and NeoX's fused projection against its description."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from neox_core.errors import ConfigError
from neox_core.model import ModelDimensions, attention_kernel
from neox_core.model.attention_kernel import causal_attention
from neox_core.model.elementwise import split_and_rotate
from neox_core.model.llama import Attention
from tests.neox_core.model import reference

Choose = Any  # the cached function

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


@pytest.fixture
def choose(monkeypatch: pytest.MonkeyPatch) -> Iterator[Choose]:
    """The choice of the kernel on a Hopper GPU, without what was chosen before."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    attention_kernel.attention_kernel.cache_clear()
    yield attention_kernel.attention_kernel
    attention_kernel.attention_kernel.cache_clear()


def installed(monkeypatch: pytest.MonkeyPatch, **modules: Any) -> None:
    for name in ("flash_attn", "flash_attn.cute"):
        monkeypatch.setitem(sys.modules, name, modules.get(name.replace(".", "_")))  # None makes the import fail


def test_only_sdpa_runs_on_cpus_and_in_fp32(choose: Choose) -> None:
    assert choose("auto", "cpu", torch.bfloat16) is attention_kernel._sdpa
    assert choose("auto", "cuda", torch.float32) is attention_kernel._sdpa
    with pytest.raises(ConfigError, match=r"train\.attention cudnn runs on CUDA devices in bf16 only, and this is cpu"):
        choose("cudnn", "cpu", torch.bfloat16)


def test_fastest_that_is_installed(
    choose: Choose, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    installed(monkeypatch)
    with caplog.at_level("INFO"):
        assert choose("auto", "cuda", torch.bfloat16) is attention_kernel._cudnn_or_sdpa
        assert choose("cudnn", "cuda", torch.bfloat16) is attention_kernel._cudnn
        choose("auto", "cpu", torch.bfloat16)
    assert caplog.messages == ["attention: cudnn or sdpa", "attention: cudnn", "attention: sdpa"]
    installed(monkeypatch, flash_attn=Flash(), flash_attn_cute=Flash())
    choose.cache_clear()
    with caplog.at_level("INFO"):
        choose("auto", "cuda", torch.bfloat16)
    assert "attention: flash_attn_4" in caplog.text
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    choose.cache_clear()
    with caplog.at_level("INFO"):
        choose("auto", "cuda", torch.bfloat16)
    assert caplog.messages[-1] == "attention: flash_attn"


def test_flash_attn_4_is_refused_on_older_gpus(choose: Choose, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, flash_attn=Flash(), flash_attn_cute=Flash())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    with pytest.raises(ConfigError, match=r"flash_attn_4 needs a Hopper GPU"):
        choose("flash_attn_4", "cuda", torch.bfloat16)


@pytest.mark.parametrize("backend", ["flash_attn_4", "flash_attn"])
def test_demanded_backend(backend: attention_kernel.AttentionBackend, choose: Choose, monkeypatch: Any) -> None:
    installed(monkeypatch)
    with pytest.raises(ConfigError, match=f"train.attention {backend} cannot be imported .* pip install"):
        choose(backend, "cuda", torch.bfloat16)
    flash = Flash(pair=backend == "flash_attn_4")
    installed(monkeypatch, flash_attn=flash, flash_attn_cute=flash)
    q, k, v = random_qkv(8, 2)
    assert choose(backend, "cuda", torch.bfloat16)(q, k, v) is q
    assert flash.settings == [{"causal": True}]


class Flash:
    """Stands for flash_attn; version 4 returns the log-sum-exp too."""

    def __init__(self, pair: bool = False) -> None:
        self.pair = pair
        self.settings: list[dict[str, Any]] = []

    def flash_attn_func(self, q: Tensor, k: Tensor, v: Tensor, **settings: Any) -> Any:
        self.settings.append(settings)
        return (q, None) if self.pair else q
