"""Norm, MLP and block against transformers' Llama and float64; names and shapes of parameters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm, LlamaRotaryEmbedding

from neox_core.checkpoint.conversion.convert import convert
from neox_core.checkpoint.conversion.reference import llama_from_meta
from neox_core.checkpoint.conversion.toy_base import make_random_base
from neox_core.checkpoint.formats.neox import NeoxCheckpoint
from neox_core.config import ModelConfig, ParallelConfig
from neox_core.model import FinalNorm, Llama, ModelDimensions, OutputHead, TokenEmbedding, TransformerBlock
from neox_core.model.llama import MLP, RMSNorm
from tests.neox_core.model.reference import fuse_qkv

TOKENS = 24


def model(num_kv_heads: int) -> ModelConfig:
    return ModelConfig(
        num_layers=2, hidden_size=64, num_attention_heads=4, num_kv_heads=num_kv_heads, intermediate_size=96,
        vocab_size=128, rope_theta=1e4,
    )  # fmt: skip


def dimensions(num_kv_heads: int) -> ModelDimensions:
    return ModelDimensions.of(model(num_kv_heads), TOKENS)


def test_rms_norm_in_float64() -> None:
    x = 5 * torch.randn(3, 7, 64, generator=torch.Generator().manual_seed(1))
    norm = RMSNorm(64, 1e-5)
    nn.init.uniform_(norm.scale, 0.5, 2.0)
    x64 = x.double()
    expected = x64 / torch.sqrt((x64**2).mean(-1, keepdim=True) + 1e-5) * norm.scale.double()
    torch.testing.assert_close(norm(x).double(), expected, rtol=1e-6, atol=1e-6)


def test_rms_norm_of_tiny_values_is_tamed_by_eps() -> None:
    assert float(RMSNorm(64, 1e-5)(torch.full((1, 64), 1e-4)).detach().max()) == pytest.approx(
        1e-4 / (1e-8 + 1e-5) ** 0.5, rel=1e-5
    )


def test_rms_norm_of_bf16_is_transformers() -> None:
    """The mean is taken in fp32: squares of bf16 numbers, summed in bf16, would be off by percents."""
    x = (30 * torch.randn(5, 64, generator=torch.Generator().manual_seed(1))).bfloat16()
    ours, theirs = RMSNorm(64, 1e-5).bfloat16(), LlamaRMSNorm(64, 1e-5).bfloat16()
    nn.init.uniform_(ours.scale, 0.5, 2.0)
    theirs.weight.data.copy_(ours.scale)
    assert torch.equal(ours(x), theirs(x))


def test_mlp_in_float64() -> None:
    mlp = MLP(dimensions(4))
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(1))
    gate, down, up = (w.weight.detach().double() for w in (mlp.w1, mlp.w2, mlp.w3))
    gated = x.double() @ gate.T
    expected = (gated / (1 + torch.exp(-gated)) * (x.double() @ up.T)) @ down.T
    torch.testing.assert_close(mlp(x).double(), expected, rtol=1e-4, atol=1e-6)


def neox_names(layer: nn.Module, kv_heads: int, of: str = "weight") -> dict[str, Tensor]:
    """A transformers decoder layer's weights, or their gradients, by NeoX's names."""
    values = {
        name: (p.grad if of == "gradient" else p.data).detach()  # type: ignore[union-attr]
        for name, p in layer.named_parameters()
    }
    q, k, v = (values[f"self_attn.{x}_proj.weight"] for x in "qkv")
    return {
        "input_layernorm.scale": values["input_layernorm.weight"],
        "attention.query_key_value.weight": fuse_qkv(q, k, v, 4, kv_heads),
        "attention.dense.weight": values["self_attn.o_proj.weight"],
        "post_attention_layernorm.scale": values["post_attention_layernorm.weight"],
        "mlp.w1.weight": values["mlp.gate_proj.weight"],
        "mlp.w2.weight": values["mlp.down_proj.weight"],
        "mlp.w3.weight": values["mlp.up_proj.weight"],
    }


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_block_is_transformers_decoder_layer(kv_heads: int) -> None:
    """Output, gradient of the input and gradient of every weight."""
    torch.manual_seed(kv_heads)
    config = LlamaConfig(
        hidden_size=64, num_attention_heads=4, num_key_value_heads=kv_heads, intermediate_size=96, rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4}, max_position_embeddings=TOKENS,
        attn_implementation="eager",
    )  # fmt: skip
    theirs, ours = LlamaDecoderLayer(config, 0), TransformerBlock(dimensions(kv_heads))
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.2)
    ours.load_state_dict(neox_names(theirs, kv_heads), strict=True)

    x = torch.randn(2, TOKENS, 64, requires_grad=True)
    x_theirs = x.detach().clone().requires_grad_()
    positions = LlamaRotaryEmbedding(config)(x, torch.arange(TOKENS)[None])
    mask = torch.full((1, 1, TOKENS, TOKENS), float("-inf")).triu(1)
    expected = theirs(x_theirs, attention_mask=mask, position_embeddings=positions)
    output = ours(x)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=2e-5)

    upstream = torch.randn(output.shape)
    output.backward(upstream)
    expected.backward(upstream)
    torch.testing.assert_close(x.grad, x_theirs.grad, rtol=1e-3, atol=1e-4)
    gradients = neox_names(theirs, kv_heads, "gradient")
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-3, atol=5e-4, msg=name)


def test_embedding_norm_and_head() -> None:
    dims = dimensions(4)
    embedding, norm, head = TokenEmbedding(dims), FinalNorm(dims), OutputHead(dims)
    ids = torch.tensor([[0, 127, 5]])
    x = embedding(ids)
    assert torch.equal(x[0], embedding.word_embeddings.weight[[0, 127, 5]])
    torch.testing.assert_close(head(x), x @ head.final_linear.weight.T)
    torch.testing.assert_close(norm(x), x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5))


@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_names_and_shapes_are_neox(tensor_parallel: int) -> None:
    """One rank's part: heads, MLP and vocabulary are divided, the hidden size is not."""
    dims = dimensions(2).shard(tensor_parallel)
    t = tensor_parallel
    expected = {
        TokenEmbedding: {"word_embeddings.weight": (128 // t, 64)},
        TransformerBlock: {
            "input_layernorm.scale": (64,),
            "attention.query_key_value.weight": ((64 + 2 * 32) // t, 64),
            "attention.dense.weight": (64, 64 // t),
            "post_attention_layernorm.scale": (64,),
            "mlp.w1.weight": (96 // t, 64),
            "mlp.w2.weight": (64, 96 // t),
            "mlp.w3.weight": (96 // t, 64),
        },
        FinalNorm: {"norm.scale": (64,)},
        OutputHead: {"final_linear.weight": (128 // t, 64)},
    }
    for layer_type, shapes in expected.items():
        state = layer_type(dims).state_dict()
        assert {name: tuple(tensor.shape) for name, tensor in state.items()} == shapes


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_the_model_equals_transformers(tmp_path: Path, kv_heads: int) -> None:
    config = model(kv_heads)
    make_random_base(config, tmp_path / "base", seed=3)
    convert(tmp_path / "base", tmp_path / "neox", config, ParallelConfig())
    layers = NeoxCheckpoint(tmp_path / "neox").layer
    ours = Llama(dimensions(kv_heads), config.num_layers)
    for index, part in {0: ours.embedding, **dict(enumerate(ours.blocks, 2))}.items():
        part.load_state_dict(layers(index, 0), strict=True)
    ours.norm.load_state_dict(layers(config.num_layers + 3, 0), strict=True)
    ours.head.load_state_dict(layers(config.num_layers + 4, 0), strict=True)
    ids = torch.randint(config.vocab_size, (2, TOKENS), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = llama_from_meta(tmp_path / "base", config, TOKENS)(ids).logits
        torch.testing.assert_close(ours(ids), expected, rtol=1e-4, atol=1e-5)
