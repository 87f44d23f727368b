"""Values of params.json and config.json that are of another type, or ask for another computation: one line each."""

from __future__ import annotations

from typing import Any

import pytest

from neox_core.checkpoint.formats.huggingface_config import read_config
from neox_core.checkpoint.formats.meta_params import read_params
from neox_core.errors import CheckpointError

PARAMS: dict[str, Any] = {"dim": 64, "n_layers": 2, "n_heads": 8, "n_kv_heads": 4, "multiple_of": 64, "norm_eps": 1e-5}
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 192,
    "vocab_size": 128,
}

YARN: dict[str, Any] = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


def test_the_plain_ones() -> None:
    assert read_params("params.json", PARAMS, 128).vocab_size == 128
    assert read_config("config.json", CONFIG).num_kv_heads == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_layers": "2"}, 'n_layers is "2": give a whole number from 1'),
        ({"dim": 64.0}, "dim is 64.0: give a whole number"),
        ({"n_heads": None}, "n_heads is null: give"),
        ({"n_heads": 0}, "n_heads is 0: give"),
        ({"n_kv_heads": 0}, "n_kv_heads is 0: give"),
        ({"n_kv_heads": True}, "n_kv_heads is true: give"),
        ({"multiple_of": 0}, "multiple_of is 0"),
        ({"rope_theta": "1e6"}, 'rope_theta is "1e6": give a number above 0, without quotes'),
        ({"rope_theta": None}, "rope_theta is null"),
        ({"norm_eps": float("inf")}, "norm_eps is Infinity"),
        ({"ffn_dim_multiplier": "1.3"}, 'ffn_dim_multiplier is "1.3"'),
        ({"vocab_size": -2}, "vocab_size is -2"),
        ({"head_dim": 16}, "head_dim is 16, but only dim / n_heads = 8 is supported"),
        ({"use_qk_norm": True}, "use_qk_norm is true, which is not known here"),
        ({"sliding_window": 4096}, "sliding_window is 4096, which is not known here"),
        ({"moe": {"num_experts": 8}}, "moe is .*not known here"),
        ({"use_scaled_rope": "yes"}, "use_scaled_rope is .yes.: give true or false"),
        ({"use_scaled_rope": True, "rope_scaling_factor": "8"}, 'rope_scaling_factor is "8"'),
    ],
)
def test_params_that_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        read_params("params.json", PARAMS | change, 128)
    assert "\n" not in str(caught.value)


def test_params_without_effect() -> None:
    extra = {"head_dim": 8, "max_seq_len": 4096, "ffn_dim_multiplier": None, "n_kv_heads": None, "use_qk_norm": False}
    assert read_params("params.json", PARAMS | extra, 128).num_kv_heads == 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": "2"}, 'num_hidden_layers is "2": give a whole number'),
        ({"hidden_size": 64.0}, "hidden_size is 64.0"),
        ({"vocab_size": None}, "vocab_size is null"),
        ({"num_key_value_heads": 0}, "num_key_value_heads is 0"),
        ({"rope_theta": "10000"}, 'rope_theta is "10000"'),
        ({"rope_scaling": "linear"}, 'rope_scaling is "linear": give an object'),
        ({"rope_scaling": ["linear", 2]}, "rope_scaling is .*: give an object"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, 'rope_scaling: factor is "2"'),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "mrope_section": [1]}}, "mrope_section is"),
        ({"attention_bias": None}, "attention_bias is null: give true or false"),
        ({"mlp_bias": 0}, "mlp_bias is 0: give true or false"),
        ({"tie_word_embeddings": "false"}, 'tie_word_embeddings is "false": give true or false'),
        ({"rms_norm_eps": None}, "rms_norm_eps is null"),
        ({"sliding_window": 4096}, "sliding_window is 4096, which is not known here"),
        ({"use_qk_norm": True}, "use_qk_norm is true"),
        (
            {"quantization_config": {"bits": 4}},
            r'quantization_config is {"bits": 4}: .* dequantize them first, .*OTHER\)$',
        ),
        ({"compression_config": {"bits": 4}}, "compression_config is .* dequantize them first"),
        ({"model_type": "minicpm", "scale_emb": 12}, "model_type is 'minicpm', but only llama, .* are supported"),
        ({"model_type": "cohere", "logit_scale": 0.0625}, "model_type is 'cohere', but only llama, .* are supported"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types is"),
        ({"num_experts": 8}, "num_experts is 8"),
        ({"is_causal": False}, "is_causal is false, which is not known here"),
        ({"is_causal": None}, "is_causal is null, which is not known here"),
        ({"use_rope": False}, "use_rope is false, which is not known here"),
        ({"residual_multiplier": 0}, "residual_multiplier is 0, which is not known here"),
        ({"partial_rotary_factor": 0.0}, "partial_rotary_factor is 0.0, which is not known here"),
        ({"attention_multiplier": 1.0}, "attention_multiplier is 1.0, which is not known here"),
        ({"model_type": "mistral", "layer_types": ["full_attention"] * 2}, "takes for a ministral"),
        ({"model_type": "mistral", "layer_types": None}, "takes for a ministral"),
        ({"rope_theta": None}, "config.json: rope_theta is null: give a number above 0"),
        ({"rope_parameters": {"rope_type": "default"}, "rope_theta": None}, "config.json: rope_theta is null: give"),
        ({"rope_parameters": {"rope_theta": None}, "rope_theta": 1e4}, "rope_parameters: rope_theta is null: give"),
        ({"rope_scaling": YARN | {"truncate": False}}, "rope_scaling: truncate is false, which is not known here"),
        (
            {"rope_parameters": YARN, "rope_scaling": {"rope_type": "default"}},
            "rope_parameters and rope_scaling differ",
        ),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "^config.json: yarn needs original_max_position_emb"),
        ({"num_hidden_layers": 10**30}, "num_layers Input should be less than or equal to 10000"),
        ({"model_type": ["llama"]}, r"model_type is \['llama'\], but only llama, .* are supported"),
    ],
)
def test_configs_that_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        read_config("config.json", CONFIG | change)
    assert "\n" not in str(caught.value)


def test_config_keys_without_effect() -> None:
    extra = {
        "architectures": ["LlamaForCausalLM"], "bos_token_id": 300, "eos_token_id": [1, 2], "attention_dropout": 0.1,
        "sliding_window": None, "use_qk_norm": False, "partial_rotary_factor": 1.0, "head_dim": None, "_name": "x",
        "layer_types": ["full_attention", "full_attention"], "torch_dtype": "bfloat16", "rope_scaling": None,
        "num_key_value_heads": None, "max_length": 20, "rope_interleaved": False, "is_causal": True,
        "residual_multiplier": None, "num_experts": 0, "quantization_config": None,
        "transformers.js_config": {"kv_cache_dtype": {"fp16": "float16"}},
    }  # fmt: skip
    assert read_config("config.json", CONFIG | extra).num_kv_heads == 8


def test_what_comes_first_where_rope_is_said_twice() -> None:
    """As transformers, and as those before version 5, which read the second alone."""
    said_twice = {
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e4},
        "rope_scaling": YARN | {"truncate": True},
    }
    model = read_config("config.json", CONFIG | said_twice)
    assert (model.rope_theta, model.rope_scaling and model.rope_scaling.rope_type) == (5e4, "yarn")
    assert read_config("config.json", CONFIG | {"rope_parameters": {"rope_theta": 5e4}, "rope_theta": None}) == (
        read_config("config.json", CONFIG | {"rope_theta": 5e4})
    )
