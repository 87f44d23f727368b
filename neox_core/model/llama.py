"""The Llama architecture (arXiv 2302.13971, 2307.09288): what one rank computes.

Shapes: B batch, T tokens, D hidden size, N query heads, K key-value heads, H head width, V vocabulary.
Parameter names are GPT-NeoX's, so that a layer's state_dict is its checkpoint file.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from neox_core.model.attention_kernel import causal_attention
from neox_core.model.dimensions import ModelDimensions
from neox_core.model.elementwise import mean_squares, rms_norm, split_and_rotate, swiglu
from neox_core.model.rope import RotaryEmbedding


class RMSNorm(nn.Module):
    """Root-mean-square normalization with a learned scale (arXiv 1910.07467)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.scale = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]"""
        return rms_norm(x, self.scale, self.eps)


class Attention(nn.Module):
    """Causal self-attention with rotary positions and grouped queries (arXiv 2305.13245)."""

    def __init__(self, dims: ModelDimensions) -> None:
        super().__init__()
        self.dims = dims
        query_width = dims.num_heads * dims.head_dim
        kv_width = dims.num_kv_heads * dims.head_dim
        self.query_key_value = nn.Linear(dims.hidden_size, query_width + 2 * kv_width, bias=dims.qkv_bias)
        if dims.qk_norm is not None:
            by_head = dims.qk_norm == "head"
            self.q_norm = RMSNorm(dims.head_dim if by_head else query_width, dims.norm_eps)
            self.k_norm = RMSNorm(dims.head_dim if by_head else kv_width, dims.norm_eps)
        self.of_all_heads: Callable[[Tensor], Tensor] | None = None
        """From means over these heads to those over all of the model's, where the module has a part of them."""
        self.dense = nn.Linear(query_width, dims.hidden_size, bias=dims.output_bias)
        self.rotary = RotaryEmbedding(dims.head_dim, dims.sequence_length, dims.rope_theta, dims.rope_scaling)

    def forward(self, x_BTD: Tensor, positions_BT: Tensor | None = None) -> Tensor:
        """[B,T,D] -> [B,T,D]"""
        return self.dense(self.attend(self.query_key_value(x_BTD), positions_BT, overwrite=True))

    def attend(self, fused_BTF: Tensor, positions_BT: Tensor | None, overwrite: bool = False) -> Tensor:
        """What every token's heads read: fused projection [B,T,F], which it may overwrite if told so, -> [B,T,N*H]"""
        cos, sin = self.rotary(fused_BTF.shape[1], positions_BT)
        dims = self.dims
        heads = dims.num_heads, dims.num_kv_heads, dims.grouped_qkv
        scales = (self.q_norm.scale, self.k_norm.scale) if dims.qk_norm else None
        means_BT2 = None
        if dims.qk_norm == "projection" and self.of_all_heads is not None:
            means_BT2 = self.of_all_heads(mean_squares(fused_BTF, dims.head_dim, *heads))
        q_BTNH, k_BTKH, v_BTKH = split_and_rotate(
            fused_BTF, cos, sin, *heads, scales, dims.norm_eps, means_BT2, overwrite
        )
        attended_BTNH = causal_attention(q_BTNH, k_BTKH, v_BTKH, positions_BT, self.dims.attention)
        return attended_BTNH.flatten(2)


class MLP(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x) (arXiv 2002.05202)."""

    def __init__(self, dims: ModelDimensions) -> None:
        super().__init__()
        self.w1 = nn.Linear(dims.hidden_size, dims.intermediate_size, bias=False)
        self.w2 = nn.Linear(dims.intermediate_size, dims.hidden_size, bias=False)
        self.w3 = nn.Linear(dims.hidden_size, dims.intermediate_size, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """[B,T,D] -> [B,T,D]"""
        return self.w2(self.activate(self.w1(x_BTD), self.w3(x_BTD)))

    def activate(self, gate_BTF: Tensor, up_BTF: Tensor) -> Tensor:
        """The gated values that w2 projects: twice [B,T,F] -> [B,T,F]"""
        return swiglu(gate_BTF, up_BTF)


class TokenEmbedding(nn.Module):
    """A vector for each token id."""

    def __init__(self, dims: ModelDimensions) -> None:
        super().__init__()
        weight = torch.empty(dims.vocab_size, dims.hidden_size)
        if not weight.is_meta:  # where torch would import its compiler to draw nothing, which takes seconds
            nn.init.normal_(weight)
        self.word_embeddings = nn.Embedding.from_pretrained(weight, freeze=False)  # type: ignore[no-untyped-call]

    def forward(self, ids_BT: Tensor) -> Tensor:
        """[B,T] -> [B,T,D]"""
        return self.word_embeddings(ids_BT)


class TransformerBlock(nn.Module):
    """Attention and MLP, each with its norm before it, or after it where the dimensions say so, and a residual around.

    Where `positions` are given, each row of tokens is a pack of documents, in each of which they count from 0, and
    attention stays within a document. Otherwise a row is one document. What runs instead of this forward, to the same
    result, is parallel/layers.py's FusedBlock.
    """

    def __init__(self, dims: ModelDimensions) -> None:
        super().__init__()
        self.norms_after = dims.norms_after
        if not dims.norms_after:
            self.input_layernorm = RMSNorm(dims.hidden_size, dims.norm_eps)
        self.attention = Attention(dims)
        self.post_attention_layernorm = RMSNorm(dims.hidden_size, dims.norm_eps)
        self.mlp = MLP(dims)
        if dims.norms_after:
            self.post_feedforward_layernorm = RMSNorm(dims.hidden_size, dims.norm_eps)

    def forward(self, x_BTD: Tensor, positions_BT: Tensor | None = None) -> Tensor:
        """[B,T,D] -> [B,T,D]"""
        if self.norms_after:
            h_BTD = x_BTD + self.post_attention_layernorm(self.attention(x_BTD, positions_BT))
            return h_BTD + self.post_feedforward_layernorm(self.mlp(h_BTD))
        h_BTD = x_BTD + self.attention(self.input_layernorm(x_BTD), positions_BT)
        return h_BTD + self.mlp(self.post_attention_layernorm(h_BTD))


class FinalNorm(nn.Module):
    """The norm after the last block."""

    def __init__(self, dims: ModelDimensions) -> None:
        super().__init__()
        self.norm = RMSNorm(dims.hidden_size, dims.norm_eps)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """[B,T,D] -> [B,T,D]"""
        return self.norm(x_BTD)


class OutputHead(nn.Module):
    """Logits over the vocabulary. Who builds the layers ties its weight to the embedding's, where the model does."""

    def __init__(self, dims: ModelDimensions) -> None:
        super().__init__()
        self.final_linear = nn.Linear(dims.hidden_size, dims.vocab_size, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """[B,T,D] -> [B,T,V]"""
        return self.final_linear(x_BTD)


class Llama(nn.Module):
    """The model. A rank builds its part of these layers one by one (parallel/build.py)."""

    def __init__(self, dims: ModelDimensions, num_layers: int) -> None:
        super().__init__()
        self.embedding = TokenEmbedding(dims)
        self.blocks = nn.ModuleList(TransformerBlock(dims.of_layer(number)) for number in range(num_layers))
        self.norm = FinalNorm(dims)
        self.head = OutputHead(dims)

    def forward(self, ids_BT: Tensor, positions_BT: Tensor | None = None) -> Tensor:
        """[B,T] -> logits [B,T,V]"""
        x_BTD = self.embedding(ids_BT)
        for block in self.blocks:
            x_BTD = block(x_BTD, positions_BT)
        return self.head(self.norm(x_BTD))
