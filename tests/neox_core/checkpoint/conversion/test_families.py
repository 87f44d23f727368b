"""Every family of models, from a tiny random one of transformers' own class to shards and back."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file, save_file

from neox_core.checkpoint.conversion.convert import convert, open_source
from neox_core.checkpoint.conversion.export import export_huggingface, prove_export
from neox_core.checkpoint.conversion.proof import prove, prove_conversion
from neox_core.checkpoint.formats.huggingface_config import read_config
from neox_core.checkpoint.formats.neox import NeoxCheckpoint
from neox_core.config import ModelConfig, ParallelConfig
from neox_core.config.families import FAMILIES, FamilyName
from neox_core.errors import CheckpointError, ConfigError
from tests.paths import ROOT

TOKENIZER = ROOT / "data/tokenizers/demo-2048.model"

CASES: dict[str, dict[str, Any]] = {
    "llama 2:1": {"model_type": "llama"},
    "llama 3:1": {"model_type": "llama", "hidden_size": 96, "num_attention_heads": 12},
    "llama 7:1, wide heads": {"model_type": "llama", "hidden_size": 112, "num_attention_heads": 28, "head_dim": 16},
    "llama tied": {
        "model_type": "llama",
        "hidden_size": 96,
        "num_attention_heads": 12,
        "tie_word_embeddings": True,
    },
    "llama with yarn": {
        "model_type": "llama",
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e5,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "beta_fast": 24.0,
        },
    },
    "llama with biases": {"model_type": "llama", "attention_bias": True},
    "qwen3 with biases": {"model_type": "qwen3", "head_dim": 32, "attention_bias": True},
    "olmo2 with biases": {"model_type": "olmo2", "pad_token_id": None, "attention_bias": True},
    "mistral": {"model_type": "mistral", "sliding_window": 4096},
    "mistral, short window": {"model_type": "mistral", "sliding_window": 24},
    "qwen2": {"model_type": "qwen2"},
    "qwen2 7:1": {"model_type": "qwen2", "hidden_size": 112, "num_attention_heads": 28, "head_dim": 16},
    "qwen3": {"model_type": "qwen3", "head_dim": 32},
    "olmo2": {"model_type": "olmo2", "pad_token_id": None},
    "olmo2 3:1": {"model_type": "olmo2", "pad_token_id": None, "hidden_size": 96, "num_attention_heads": 12},
    "smollm3": {
        "model_type": "smollm3",
        "pad_token_id": None,
        "num_hidden_layers": 4,
        "no_rope_layers": [1, 0, 0, 1],  # not the same in each of two stages
        "tie_word_embeddings": True,
    },
    "smollm3, every second": {
        "model_type": "smollm3",
        "pad_token_id": None,
        "num_hidden_layers": 4,
        "no_rope_layer_interval": 2,
    },
    "qwen3 3:1": {"model_type": "qwen3", "hidden_size": 96, "num_attention_heads": 12, "head_dim": 32},
}
LAYOUTS = [(1, 1), (2, 1), (1, 2), (2, 2), (4, 1)]


def write_model(folder: Path, **changes: Any) -> dict[str, torch.Tensor]:
    """A tiny random model of transformers' own class in bf16; biases and norms are random too."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes: dict[str, Any] = {
        "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 256, "rope_theta": 1e5,
        "tie_word_embeddings": False,
    } | changes  # fmt: skip
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(sizes.pop("model_type"), **sizes)).bfloat16()
    with torch.no_grad():
        for value in model.parameters():
            value.copy_(torch.randn(value.shape) * 0.1 + (value.dim() == 1))
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("tensor", "pipeline"), LAYOUTS)
def test_round_trip_keeps_every_bit(case: str, tensor: int, pipeline: int, tmp_path: Path) -> None:
    original = write_model(tmp_path / "base", **CASES[case])
    model = open_source(tmp_path / "base").model
    parallel = ParallelConfig(tensor=tensor, pipeline=pipeline)
    summary = convert(
        tmp_path / "base", tmp_path / "neox", model, parallel,
        prove=lambda source, shards: prove_conversion(source.folder, shards, model),
    )  # fmt: skip
    assert summary["largest_layer_difference"] <= 1e-5
    export_huggingface(tmp_path / "neox", tmp_path / "hf", model, None, 256)
    exported = load_file(tmp_path / "hf" / "model.safetensors")
    assert exported.keys() == original.keys()
    tied = json.loads((tmp_path / "hf" / "config.json").read_text())["tie_word_embeddings"]
    assert tied == ("lm_head.weight" not in exported)
    assert all(torch.equal(exported[name], value) for name, value in original.items())
    assert open_source(tmp_path / "hf").model == model


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sentencepiece_model_is_exported_as_transformers_will_read_it(family: FamilyName, tmp_path: Path) -> None:
    """For some families AutoTokenizer builds a tokenizer of its own, which a finished training's export found out."""
    write_model(tmp_path / "base", **CASES[family if family != "llama" else "llama 2:1"] | {"vocab_size": 2048})
    model = open_source(tmp_path / "base").model
    convert(tmp_path / "base", tmp_path / "neox", model, ParallelConfig())
    prove_it = partial(prove_export, NeoxCheckpoint(tmp_path / "neox"), model=model)
    summary = export_huggingface(tmp_path / "neox", tmp_path / "hf", model, TOKENIZER, 256, prove=prove_it)
    if FAMILIES[family].own_tokenizer:
        assert f"every tokenizer of the family {family} as byte-level, so no equal" in summary["tokenizer"]
        assert (tmp_path / "hf/sentencepiece.model").read_bytes() == TOKENIZER.read_bytes()
        assert not list((tmp_path / "hf").glob("tokenizer*"))
    else:
        assert summary["tokenizer_tokens"] > 100


@pytest.mark.parametrize("family", ["qwen2", "olmo2"])
def test_more_ranks_than_kv_heads(family: str, tmp_path: Path) -> None:
    original = write_model(
        tmp_path / "base", model_type=family, hidden_size=96, num_attention_heads=12, num_key_value_heads=2
    )
    model = open_source(tmp_path / "base").model
    convert(tmp_path / "base", tmp_path / "neox", model, ParallelConfig(tensor=4))
    prove(NeoxCheckpoint(tmp_path / "neox"), tmp_path / "base", model)
    export_huggingface(tmp_path / "neox", tmp_path / "hf", model, None, 256)
    exported = load_file(tmp_path / "hf" / "model.safetensors")
    assert all(torch.equal(exported[name], value) for name, value in original.items())


def no_bias(weights: dict[str, torch.Tensor]) -> None:
    weights["model.layers.1.self_attn.q_proj.bias"].zero_()


def no_output_bias(weights: dict[str, Any]) -> None:
    weights["model.layers.1.self_attn.o_proj.bias"].zero_()


def swapped_norms(weights: dict[str, torch.Tensor]) -> None:
    q, k = (f"model.layers.1.self_attn.{name}_norm.weight" for name in "qk")
    weights[q], weights[k] = weights[k], weights[q]


def wrong_groups(weights: dict[str, torch.Tensor]) -> None:
    name = "model.layers.1.self_attn.q_proj.weight"
    by_group = weights[name].view(4, 3, 8, -1)
    weights[name] = by_group.transpose(0, 1).reshape(weights[name].shape).contiguous()


def norms_of_other_heads(weights: dict[str, torch.Tensor]) -> None:
    name = "model.layers.1.self_attn.k_norm.weight"
    weights[name] = weights[name].roll(8)


def swapped_layer_norms(weights: dict[str, torch.Tensor]) -> None:
    attention, mlp = (f"model.layers.0.post_{name}_layernorm.weight" for name in ("attention", "feedforward"))
    weights[attention], weights[mlp] = weights[mlp], weights[attention]


def another_head(shards: Path, model: ModelConfig) -> None:
    """The head of a tied model, changed in NeoX's files, which have it next to the embedding."""
    (path,) = shards.rglob("mp_rank_00_model_states.pt")
    content = torch.load(path)
    content["module"][f"sequential.{model.num_layers + 4}.final_linear.weight"][7] *= 1.1
    torch.save(content, path)


def test_another_head_than_the_embedding_is_caught(tmp_path: Path) -> None:
    write_model(tmp_path / "base", **CASES["llama tied"])
    model = open_source(tmp_path / "base").model
    convert(tmp_path / "base", tmp_path / "neox", model, ParallelConfig())
    another_head(tmp_path / "neox", model)
    export_huggingface(tmp_path / "neox", tmp_path / "hf", model, None, 256)
    with pytest.raises(CheckpointError, match=r"logits of .* differ"):
        prove(NeoxCheckpoint(tmp_path / "neox"), tmp_path / "hf", model)


@pytest.mark.parametrize("method", ["mean", "normal", "zeros"])
def test_new_tokens_of_a_tied_model_are_tied(method: Literal["mean", "normal", "zeros"], tmp_path: Path) -> None:
    write_model(tmp_path / "base", **CASES["llama tied"])
    model = open_source(tmp_path / "base").model.model_copy(update={"vocab_size": 132})
    convert(
        tmp_path / "base", tmp_path / "neox", model, ParallelConfig(), base_vocab_size=128, new_tokens=method
    )  # fmt: skip
    weights = NeoxCheckpoint(tmp_path / "neox").weights(model)
    assert torch.equal(weights.tensor("lm_head.weight"), weights.tensor("model.embed_tokens.weight"))


@pytest.mark.parametrize(
    ("case", "mistake"),
    [
        ("qwen2", no_bias),
        ("llama with biases", no_output_bias),
        ("qwen3", swapped_norms),
        ("llama 3:1", wrong_groups),
        ("olmo2", norms_of_other_heads),
        ("olmo2", swapped_layer_norms),
    ],
)
def test_a_wrong_conversion_is_caught(case: str, mistake: Callable[[dict[str, Any]], None], tmp_path: Path) -> None:
    weights = write_model(tmp_path / "base", **CASES[case])
    model = open_source(tmp_path / "base").model
    mistake(weights)
    save_file(weights, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    convert(tmp_path / "base", tmp_path / "neox", model, ParallelConfig(tensor=2))
    write_model(tmp_path / "base", **CASES[case])
    with pytest.raises(CheckpointError, match="differ"):
        prove(NeoxCheckpoint(tmp_path / "neox"), tmp_path / "base", model)


@pytest.mark.parametrize(
    ("case", "changes", "words"),
    [
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 1}, "use_sliding_window is True"),
        ("qwen3", {"use_sliding_window": True, "max_window_layers": 0}, "use_sliding_window is True"),
        (
            "smollm3",
            {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 4},
            "use_sliding_window is",
        ),
        ("olmo2", {"sliding_window": 4096}, "sliding_window is 4096, which is not known here"),
        ("llama 2:1", {"attention_bias": True}, "q_proj.bias is missing"),
        ("mistral", {"attention_bias": True}, "attention_bias is True"),
        ("qwen2", {"attention_bias": True}, "attention_bias is True"),
        ("llama 2:1", {"mlp_bias": True}, "mlp_bias is True"),
        ("qwen3", {"head_dim": None}, "lacks 'head_dim'"),
        ("mistral", {"num_key_value_heads": None}, "num_key_value_heads"),
        ("llama 2:1", {"sliding_window": 4096}, "sliding_window is 4096, which is not known here"),
        ("llama 2:1", {"no_rope_layers": [1, 0]}, "no_rope_layers is .*, which is not known here"),
        ("smollm3", {"use_sliding_window": True, "sliding_window": 24}, "use_sliding_window is True"),
        ("smollm3", {"layer_types": ["sliding_attention"] * 4}, "layer_types is .*, which is not known here"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers is .*: give for each of 4 layers 1"),
        ("smollm3", {"no_rope_layers": [2] * 4}, "no_rope_layers is .*: give for each of 4 layers 1"),
        ("smollm3", {"num_key_value_heads": None}, "num_key_value_heads"),
        ("llama 2:1", {"model_type": "gemma"}, "but only llama, mistral, qwen2, qwen3, olmo2, smollm3 are supported"),
    ],
)
def test_what_would_compute_something_else_is_refused(
    case: str, changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    write_model(tmp_path, **CASES[case])
    config = json.loads((tmp_path / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    with pytest.raises(CheckpointError, match=words):
        open_source(tmp_path)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@pytest.mark.parametrize(("first", "full"), [(1, False), (2, True), (None, True)])
def test_a_window_that_no_layer_has_is_none(family: str, first: int | None, full: bool, tmp_path: Path) -> None:
    """transformers gives the window to layers from max_window_layers on; without the key from 28 on."""
    from transformers import AutoConfig

    write_model(tmp_path / "base", **CASES[family])
    path = tmp_path / "base" / "config.json"
    config = json.loads(path.read_text()) | {"use_sliding_window": True, "sliding_window": 8}
    for key in ("layer_types", "max_window_layers"):
        del config[key]
    path.write_text(json.dumps(config | ({} if first is None else {"max_window_layers": first})))
    theirs = AutoConfig.from_pretrained(tmp_path / "base")
    assert (set(theirs.layer_types) == {"full_attention"}) == full
    if not full:
        with pytest.raises(CheckpointError, match="use_sliding_window is True"):
            open_source(tmp_path / "base")
        return
    model = open_source(tmp_path / "base").model
    convert(tmp_path / "base", tmp_path / "neox", model, ParallelConfig())
    prove(NeoxCheckpoint(tmp_path / "neox"), tmp_path / "base", model)


def test_a_mistral_without_a_window_key_has_the_family_s_default(tmp_path: Path) -> None:
    write_model(tmp_path, **CASES["mistral"])
    config = json.loads((tmp_path / "config.json").read_text())
    del config["sliding_window"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert open_source(tmp_path).model.sliding_window == 4096


def test_a_window_that_is_ignored_is_caught(tmp_path: Path) -> None:
    write_model(tmp_path / "base", **CASES["mistral, short window"])
    model = open_source(tmp_path / "base").model
    ignoring = model.model_copy(update={"sliding_window": None})
    with pytest.raises(ConfigError, match=r"sliding_window None \(source: 24\)"):
        convert(tmp_path / "base", tmp_path / "neox", ignoring, ParallelConfig())
    assert not (tmp_path / "neox").exists()
    convert(tmp_path / "base", tmp_path / "neox", model, ParallelConfig())
    with pytest.raises(CheckpointError, match=r"logits of .* differ"):
        prove(NeoxCheckpoint(tmp_path / "neox"), tmp_path / "base", ignoring)


def test_rotation_on_all_layers_is_caught(tmp_path: Path) -> None:
    write_model(tmp_path / "base", **CASES["smollm3"])
    model = open_source(tmp_path / "base").model
    assert model.layers_without_rope == (1, 2)
    everywhere = model.model_copy(update={"layers_without_rope": ()})
    with pytest.raises(ConfigError, match=r"layers_without_rope \(\) \(source: \(1, 2\)\)"):
        convert(tmp_path / "base", tmp_path / "neox", everywhere, ParallelConfig())
    convert(tmp_path / "base", tmp_path / "neox", model, ParallelConfig())
    with pytest.raises(CheckpointError, match=r"logits of .* differ"):
        prove(NeoxCheckpoint(tmp_path / "neox"), tmp_path / "base", everywhere)
    # The same weights, which transformers reads with an exported config.json that rotates as the base does, or wrongly.
    export_huggingface(tmp_path / "neox", tmp_path / "right", model, None, 256)
    prove(NeoxCheckpoint(tmp_path / "neox"), tmp_path / "right", model)
    export_huggingface(tmp_path / "neox", tmp_path / "wrong", everywhere, None, 256)
    with pytest.raises(CheckpointError, match=r"logits of .* differ"):
        prove(NeoxCheckpoint(tmp_path / "neox"), tmp_path / "wrong", model)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("left_out", [None, "num_key_value_heads", "head_dim"])
def test_a_config_json_that_says_little_is_what_transformers_takes_it_for(
    family: str, left_out: str | None, tmp_path: Path
) -> None:
    """Or refused, where the class has a number of its own that does not follow from the model's sizes."""
    from transformers import AutoConfig

    content = {
        "model_type": family, "vocab_size": 128, "hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 16,
    }  # fmt: skip
    content.pop(left_out or "", None)
    (tmp_path / "config.json").write_text(json.dumps(content))
    theirs = AutoConfig.from_pretrained(tmp_path)
    found = {"num_key_value_heads": theirs.num_key_value_heads, "head_dim": getattr(theirs, "head_dim", None) or 8}
    if left_out is not None and found[left_out] != {"num_key_value_heads": 16, "head_dim": 8}[left_out]:
        with pytest.raises(CheckpointError, match=f"lacks '{left_out}'"):
            read_config("config.json", content)
        return
    model = read_config("config.json", content)
    assert [model.num_kv_heads, model.head_dim] == list(found.values())
    assert model.norm_eps == theirs.rms_norm_eps
    assert model.rope_theta == theirs.rope_parameters["rope_theta"]
    assert model.tied_embeddings == theirs.tie_word_embeddings
    assert model.sliding_window == getattr(theirs, "sliding_window", None)


def test_a_smollm3_that_says_nothing_is_what_transformers_takes_it_for(tmp_path: Path) -> None:
    from transformers import AutoConfig

    write_model(tmp_path, model_type="smollm3", pad_token_id=None, num_hidden_layers=9)
    config = json.loads((tmp_path / "config.json").read_text())
    silent = ("no_rope_layers", "no_rope_layer_interval", "layer_types", "rope_parameters", "rope_theta")
    content = {k: v for k, v in config.items() if k not in (*silent, "tie_word_embeddings", "rms_norm_eps")}
    (tmp_path / "config.json").write_text(json.dumps(content))
    model, theirs = open_source(tmp_path).model, AutoConfig.from_pretrained(tmp_path)
    assert [int(n not in model.layers_without_rope) for n in range(9)] == theirs.no_rope_layers
    assert model.rope_theta == theirs.rope_parameters["rope_theta"]
    assert model.tied_embeddings == theirs.tie_word_embeddings
    assert model.norm_eps == theirs.rms_norm_eps


def test_later_settings_leave_the_identity_of_older_models(model_of: Callable[..., ModelConfig]) -> None:
    content = model_of().model_dump(mode="json")
    assert not content.keys() & {"family", "head_dim", "layers_without_rope", "sliding_window", "tied_embeddings"}
    assert ModelConfig(**content) == model_of()
    for changed in (model_of(family="qwen3", head_dim=32), model_of(family="smollm3", layers_without_rope=(1,))):
        assert ModelConfig(**changed.model_dump(mode="json")) == changed


def test_metas_format_has_no_words_for_other_families(model_of: Callable[..., ModelConfig]) -> None:
    from neox_core.checkpoint.formats.meta_params import meta_params

    with pytest.raises(ConfigError, match="not qwen2 with heads of 8"):
        meta_params(model_of(family="qwen2"))
    with pytest.raises(ConfigError, match="no word for tied embeddings"):
        meta_params(model_of(tied_embeddings=True))
