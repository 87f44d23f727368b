"""Sections on the model and the weights it starts from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import (
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    SerializerFunctionWrapHandler,
    TypeAdapter,
    ValidationError,
    model_serializer,
    model_validator,
)

from neox_core.config.families import FAMILIES, Family, FamilyName
from neox_core.config.section import ConfigPath, S3Prefix, Section


class BaseModelConfig(Section):
    """The weights to start from: a folder in Meta's raw format (params.json, consolidated.NN.pth) or Hugging Face's."""

    path: ConfigPath | S3Prefix = Field(description="a folder, or s3://bucket/prefix in the storage section's store")
    rope_theta: PositiveFloat | None = Field(
        None, description="the base's RoPE theta where the run changes it on purpose; None: model.rope_theta"
    )
    vocab_size: PositiveInt | None = Field(
        None, description="the base's vocabulary where the run adds tokens or padding on purpose; None: the model's"
    )
    new_tokens: Literal["mean", "normal", "zeros"] = Field("mean", description="how rows that the base lacks are made")
    random_seed: int | None = Field(None, description="toys only: make random weights at `path` when it is missing")


def _whole(value: Any) -> int | None:
    """A whole number as fields read it, 8.0 and '8' too; None: it is none."""
    try:
        return TypeAdapter(int).validate_python(value)
    except ValidationError:
        return None


_ALL = ("rope_type", "factor")
_YARN = ("beta_fast", "beta_slow", "attention_factor")
_SCALINGS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "linear": ((), ()),
    "llama3": (("low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), ()),
    "yarn": (("original_max_position_embeddings",), _YARN),
}
"""Of each way to scale positions the settings that it needs, and those that it may have beyond."""


class RopeScalingConfig(Section):
    """Positions of a model that was extended to longer sequences, as Hugging Face names them (see model/rope.py)."""

    rope_type: Literal["linear", "llama3", "yarn"] = Field(
        description="linear: all positions divided by `factor`; llama3, yarn: only long wavelengths"
    )
    factor: PositiveFloat = Field(description="how many times longer sequences are than those of the first training")
    low_freq_factor: PositiveFloat | None = Field(None, description="llama3 only; Llama 3.1: 1")
    high_freq_factor: PositiveFloat | None = Field(None, description="llama3 only; Llama 3.1: 4")
    original_max_position_embeddings: PositiveInt | None = Field(
        None, description="llama3 and yarn: positions of the first training; Llama 3.1: 8192"
    )
    beta_fast: PositiveFloat | None = Field(None, description="yarn only; None: 32")
    beta_slow: PositiveFloat | None = Field(None, description="yarn only; None: 1")
    attention_factor: PositiveFloat | None = Field(None, description="yarn only; None: 0.1 ln(factor) + 1")

    @model_serializer(mode="wrap")
    def _without_what_is_not_given(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # What was made before yarn's settings existed keeps its identity.
        content: dict[str, Any] = handler(self)
        return {key: value for key, value in content.items() if value is not None or key not in _YARN}

    @model_validator(mode="after")
    def _check(self) -> RopeScalingConfig:
        needed, optional = _SCALINGS[self.rope_type]
        given = [name for name in type(self).model_fields if name not in _ALL and getattr(self, name) is not None]
        if not set(needed) <= set(given) <= {*needed, *optional}:
            may = f" and may have {', '.join(optional)}" if optional else ""
            raise ValueError(
                f"{self.rope_type} needs {', '.join(needed) or 'no more'}{may}; {self.rope_type} has "
                f"{', '.join(given) or 'none'}"
            )
        if self.beta_fast and self.beta_slow and self.beta_fast <= self.beta_slow:
            raise ValueError(f"beta_fast {self.beta_fast} must exceed beta_slow {self.beta_slow}")
        if self.low_freq_factor and self.high_freq_factor and self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor {self.high_freq_factor} must exceed low_freq_factor {self.low_freq_factor}"
            )
        return self


class ModelConfig(Section):
    """Architecture of a Llama-type model."""

    family: FamilyName = Field("llama", description="in what the model differs from Llama (config/families.py)")
    # More would be a mistake, whose tensors' names alone take all memory.
    num_layers: PositiveInt = Field(le=10_000, description="transformer blocks")
    hidden_size: PositiveInt = Field(description="width of the residual stream")
    num_attention_heads: PositiveInt = Field(description="query heads")
    num_kv_heads: PositiveInt = Field(
        description="key-value heads; as many as query heads: multi-head attention, fewer: grouped-query attention"
    )
    head_dim: int = Field(0, ge=0, description="width of a head; 0: hidden_size / num_attention_heads")
    intermediate_size: PositiveInt = Field(description="width of the MLP")
    vocab_size: PositiveInt = Field(description="rows of the embedding and of the output head")
    unpadded_vocab_size: PositiveInt | None = Field(
        None, description="tokens; the rows of vocab_size above it are padding, cut off on export. None: no padding"
    )
    rope_theta: PositiveFloat = Field(description="base of the rotary embedding's wavelengths")
    rope_scaling: RopeScalingConfig | None = Field(None, description="None: positions are not scaled")
    layers_without_rope: tuple[NonNegativeInt, ...] = Field(
        (), description="smollm3 only: numbers, from 0 and ascending, of the layers without rotary positions"
    )
    norm_eps: PositiveFloat = Field(1e-5, description="added to the mean square in RMSNorm; Llama's value")
    sliding_window: PositiveInt | None = Field(
        None, description="mistral only: positions that attention reaches back; sequences must not be longer"
    )

    attention_bias: bool = Field(
        False, description="not mistral, qwen2: queries, keys, values and attention's output have a bias"
    )
    tied_embeddings: bool = Field(False, description="the output head's weight is the embedding's, as in small models")

    @property
    def differences(self) -> Family:
        """In what the model differs from Llama."""
        return FAMILIES[self.family]

    @property
    def grouped_qkv(self) -> bool:
        """The fused projection goes by KV heads (each one's queries, key, value), since NeoX's form, by query heads
        with a slice of key and value each, cannot hold this ratio."""
        return self.head_dim % (2 * self.queries_per_kv) != 0

    @property
    def num_tokens(self) -> int:
        """Rows of the vocabulary that stand for tokens."""
        return self.unpadded_vocab_size or self.vocab_size

    @property
    def queries_per_kv(self) -> int:
        """Query heads that share one key-value head (1 for multi-head attention)."""
        return self.num_attention_heads // self.num_kv_heads

    @model_validator(mode="before")
    @classmethod
    def _default_head_dim(cls, values: Any) -> Any:
        if not isinstance(values, dict) or values.get("head_dim"):
            return values
        hidden, heads = _whole(values.get("hidden_size")), _whole(values.get("num_attention_heads"))
        if hidden is not None and heads is not None and heads > 0:
            if hidden % heads:
                raise ValueError(f"hidden_size {hidden} is not divisible by num_attention_heads {heads}")
            return values | {"head_dim": hidden // heads}
        return values

    @model_serializer(mode="wrap")
    def _without_later_defaults(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # What was made before these settings existed keeps its identity.
        defaults = {
            "family": "llama",
            "attention_bias": False,
            "head_dim": self.hidden_size // self.num_attention_heads,
            "layers_without_rope": (),
            "sliding_window": None,
            "tied_embeddings": False,
        }
        content: dict[str, Any] = handler(self)
        return {
            key: value for key, value in content.items() if key not in defaults or getattr(self, key) != defaults[key]
        }

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if self.num_attention_heads % self.num_kv_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not divisible by num_kv_heads {self.num_kv_heads}"
            )
        if self.head_dim % 2 or self.head_dim == 0:
            raise ValueError(f"head_dim {self.head_dim} is not a multiple of 2, which rotary positions need")
        if self.attention_bias and not self.differences.attention_bias:
            raise ValueError(f"attention_bias is not computed for the family {self.family}")
        if self.sliding_window is not None and self.differences.sliding_window is None:
            raise ValueError(f"sliding_window {self.sliding_window} is not computed for the family {self.family}")
        if self.rope_scaling is not None and self.rope_scaling.rope_type == "yarn" and self.rope_theta <= 1:
            raise ValueError(f"yarn needs a rope_theta above 1, not {self.rope_theta}, since it takes its logarithm")
        if without := list(self.layers_without_rope):
            if self.differences.no_rope_interval is None:
                raise ValueError(f"layers_without_rope {without} is not computed for the family {self.family}")
            if without != sorted(set(without)) or without[-1] >= self.num_layers:
                raise ValueError(f"layers_without_rope {without} must ascend, up to {self.num_layers - 1}")
        if self.num_tokens > self.vocab_size:
            raise ValueError(f"unpadded_vocab_size {self.num_tokens} exceeds vocab_size {self.vocab_size}")
        return self
