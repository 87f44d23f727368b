"""The numbers that shape a model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from neox_core.kernels.attention import AUTO
from neox_core.model.rope import NO_ROTATION, RopeScaling

if TYPE_CHECKING:  # so that the model needs nothing but torch
    from neox_core.config.families import QkNorm
    from neox_core.config.model_sections import ModelConfig


@dataclass(frozen=True)
class ModelDimensions:
    """Shape of the model, or of the narrower model that one tensor-parallel rank computes."""

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    rope_theta: float
    norm_eps: float
    sequence_length: int
    """Longest sequence; the size of the RoPE tables."""
    attention: str = AUTO
    """Name of the causal attention's kernel (kernels/attention.py)."""
    rope_scaling: RopeScaling | None = None
    layers_without_rope: tuple[int, ...] = ()
    """Numbers of the transformer layers, from 0 over the whole model, whose positions are not rotated."""
    grouped_qkv: bool = False
    """The fused projection's rows go by KV heads, not by query heads (elementwise.py)."""
    qkv_bias: bool = False
    output_bias: bool = False
    """Attention's output has a bias, which is added to the sum of all heads."""
    qk_norm: QkNorm | None = None
    """Queries and keys are normalized, by head or over all heads, those of other ranks included."""
    norms_after: bool = False
    """What attention and MLP add is normalized, not what they read."""
    tied_embeddings: bool = False
    """The output head's weight is the embedding's."""

    @classmethod
    def of(cls, model: ModelConfig, sequence_length: int, attention: str = AUTO) -> ModelDimensions:
        """The whole model's dimensions."""
        return cls(
            hidden_size=model.hidden_size,
            num_heads=model.num_attention_heads,
            num_kv_heads=model.num_kv_heads,
            head_dim=model.head_dim,
            intermediate_size=model.intermediate_size,
            vocab_size=model.vocab_size,
            rope_theta=model.rope_theta,
            norm_eps=model.norm_eps,
            sequence_length=sequence_length,
            attention=attention,
            rope_scaling=RopeScaling(**model.rope_scaling.model_dump()) if model.rope_scaling else None,
            layers_without_rope=model.layers_without_rope,
            grouped_qkv=model.grouped_qkv,
            qkv_bias=model.differences.qkv_bias or model.attention_bias,
            output_bias=model.attention_bias,
            qk_norm=model.differences.qk_norm,
            norms_after=model.differences.norms_after,
            tied_embeddings=model.tied_embeddings,
        )

    def of_layer(self, number: int) -> ModelDimensions:
        """Those of one transformer layer, by its number in the whole model.

        Layers without rotation run the same kernels on other tables, so that one form of these serves them all.
        """
        return replace(self, rope_scaling=NO_ROTATION) if number in self.layers_without_rope else self

    def shard(self, tensor_parallel: int) -> ModelDimensions:
        """What one of `tensor_parallel` ranks computes: fewer heads, a narrower MLP, a part of the vocabulary.

        Where there are more ranks than KV heads, neighbours have the same one.
        """
        return replace(
            self,
            num_heads=self.num_heads // tensor_parallel,
            num_kv_heads=max(1, self.num_kv_heads // tensor_parallel),
            intermediate_size=self.intermediate_size // tensor_parallel,
            vocab_size=self.vocab_size // tensor_parallel,
        )
