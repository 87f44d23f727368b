"""A Hugging Face folder's description of the model: config.json and generation_config.json."""

from __future__ import annotations

import json
from typing import Any

import torch

from neox_core.config import ModelConfig


def llama_config(model: ModelConfig, sequence_length: int, **further: Any) -> Any:
    """transformers' LlamaConfig of the model; `further` fields are passed on."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.intermediate_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        rms_norm_eps=model.norm_eps,
        max_position_embeddings=sequence_length,
        rope_parameters={"rope_type": "default", "rope_theta": model.rope_theta},
        tie_word_embeddings=False,
        **further,
    )


def config_files(model: ModelConfig, sequence_length: int, dtype: torch.dtype, bos: int, eos: int) -> dict[str, str]:
    """config.json and generation_config.json by name.

    transformers 5 keeps the RoPE base in rope_parameters; versions before 5, and tools modelled on them, read
    rope_theta and torch_dtype at the top level, so both are given.
    """
    from transformers import GenerationConfig

    name = str(dtype).removeprefix("torch.")
    config = llama_config(
        model,
        sequence_length,
        architectures=["LlamaForCausalLM"],
        dtype=name,
        bos_token_id=bos,
        eos_token_id=eos,
    )
    content = json.loads(config.to_json_string()) | {"rope_theta": model.rope_theta, "torch_dtype": name}
    generation = GenerationConfig(bos_token_id=bos, eos_token_id=eos)
    return {
        "config.json": json.dumps(content, indent=2, sort_keys=True) + "\n",
        "generation_config.json": generation.to_json_string(),
    }
