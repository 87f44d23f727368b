"""In what a family of models differs from Llama. Everything else is the same: one model, one tensor map, one proof."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

FamilyName = Literal["llama", "mistral", "qwen2", "qwen3", "olmo2", "smollm3"]
QkNorm = Literal["head", "projection"]


@dataclass(frozen=True)
class Family:
    """A family's differences from Llama, and what transformers calls it and leaves out of its config.json."""

    classes: str
    """Prefix of transformers' classes."""
    qkv_bias: bool = False
    """Queries, keys and values have a bias."""
    attention_bias: bool = True
    """A model may say that they and attention's output have one."""
    qk_norm: QkNorm | None = None
    """Queries and keys are normalized before they are rotated: those of each head, or all heads' together."""
    norms_after: bool = False
    """What attention and MLP add is normalized, not what they read."""
    kv_heads_default: bool = False
    """A config.json without num_key_value_heads means as many as query heads."""
    head_dim_default: bool = True
    """A config.json without head_dim means hidden_size / num_attention_heads."""
    norm_eps_default: float = 1e-6
    """What a config.json without rms_norm_eps means."""
    rope_theta_default: float = 10000.0
    """What a config.json without a RoPE base means."""
    tied_default: bool = False
    """What a config.json without tie_word_embeddings means."""
    no_rope_interval: int | None = None
    """What a config.json without no_rope_layer_interval means: every n-th layer is without rotary positions; None: the
    family's layers all have them."""
    own_tokenizer: bool = False
    """transformers' AutoTokenizer builds the family's usual, byte-level tokenizer, whatever the folder's files say."""
    sliding_window: int | None = None
    """What a config.json without sliding_window means; None: the family's models attend to all earlier positions."""


FAMILIES: Mapping[FamilyName, Family] = {
    "llama": Family("Llama", kv_heads_default=True),
    "mistral": Family("Mistral", attention_bias=False, sliding_window=4096),
    "qwen2": Family("Qwen2", qkv_bias=True, attention_bias=False, own_tokenizer=True),
    "qwen3": Family("Qwen3", qk_norm="head", head_dim_default=False),
    "olmo2": Family("Olmo2", qk_norm="projection", norms_after=True, kv_heads_default=True, norm_eps_default=1e-5),
    "smollm3": Family("SmolLM3", rope_theta_default=2e6, tied_default=True, no_rope_interval=4),
}
"""By transformers' model_type."""
