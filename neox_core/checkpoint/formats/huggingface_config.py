"""config.json and generation_config.json, Hugging Face's descriptions of a model, read and written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch

from neox_core.checkpoint.formats.description import Values, described_by, shown
from neox_core.checkpoint.formats.model_files import CONFIG_FILE
from neox_core.checkpoint.formats.special_ids import GENERATION_FILE, SpecialIds
from neox_core.config import ModelConfig, RopeScalingConfig
from neox_core.config.families import FAMILIES, Family
from neox_core.errors import CheckpointError

_SCALINGS = ("linear", "llama3", "yarn")
_COMPUTED = """model_type hidden_act hidden_size num_attention_heads num_key_value_heads num_hidden_layers head_dim
    intermediate_size vocab_size rms_norm_eps rope_theta rope_parameters rope_scaling attention_bias mlp_bias
    tie_word_embeddings"""
_WINDOW_KEYS = frozenset(["sliding_window", "use_sliding_window", "max_window_layers"])
"""Of families that have windows, whether used or not."""
_MAX_WINDOW_LAYERS = 28
"""What a qwen's config.json without max_window_layers means."""
_QUANTIZED = ("quantization_config", "compression_config")
_NO_ROPE_KEYS = frozenset(["no_rope_layers", "no_rope_layer_interval"])
"""Of families whose layers may lack rotary positions."""
_NO_ROPE_FAMILIES = tuple(name for name, family in FAMILIES.items() if family.no_rope_interval is not None)
_WITHOUT_EFFECT = """architectures torch_dtype dtype transformers_version use_cache initializer_range attention_dropout
    hidden_dropout resid_pdrop embd_pdrop attn_pdrop max_position_embeddings max_sequence_length model_max_length
    pretraining_tp bos_token_id eos_token_id pad_token_id sep_token_id cls_token_id mask_token_id unk_token_id
    decoder_start_token_id tokenizer_class name_or_path attn_implementation is_llama_config unsloth_fixed
    unsloth_version chunk_size_feed_forward id2label label2id is_encoder_decoder is_decoder output_attentions
    output_hidden_states problem_type return_dict return_dict_in_generate output_scores tie_encoder_decoder torchscript
    finetuning_task task_specific_params prefix do_sample early_stopping max_length min_length num_beams num_beam_groups
    diversity_penalty temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id
    num_return_sequences remove_invalid_values suppress_tokens begin_suppress_tokens transformers.js_config"""
"""Of transformers' configurations of all ages: training, generation and bookkeeping."""
_KNOWN = frozenset(f"{_COMPUTED} {_WITHOUT_EFFECT}".split())
_COUNTS = frozenset(["num_experts", "num_local_experts"])
"""Of what our model has one, or none."""
_FACTORS = "partial_rotary_factor rotary_pct logit_scale logits_scaling embedding_multiplier residual_multiplier"
_MULTIPLIERS = frozenset(_FACTORS.split())
_ALWAYS = """is_causal causal truncate use_rope use_rotary_embedding use_rotary_embeddings rotary scale_attn_weights
    use_gated_mlp do_layer_norm_before normalize_before pre_norm"""
_SWITCHES = frozenset(_ALWAYS.split())
"""What our model always does, and what another does not where false or nothing is said; yarn's truncate rounds."""
_ROPE_KEYS = frozenset(("rope_type", "type", "rope_theta", *RopeScalingConfig.model_fields))


def read_config(path: str, config: Mapping[str, Any]) -> ModelConfig:
    """The model that config.json describes.

    Raises:
        CheckpointError: a value is missing or of the wrong kind, or asks for something that is not computed here.
    """
    name = config.get("model_type") or "llama"
    _refuse_other_models(path, name, config)
    values = _without_neutral(Values(path, config))
    known = _KNOWN if name in ("llama", "olmo2") else _KNOWN | _WINDOW_KEYS
    values.check_known(known | _NO_ROPE_KEYS if name in _NO_ROPE_FAMILIES else known)
    with described_by(path):
        hidden, heads = values.whole("hidden_size"), values.whole("num_attention_heads")
        family = _family(values, name)
        return ModelConfig(
            family=name,
            head_dim=values.whole("head_dim", hidden // heads if family.head_dim_default else None, nullable=True),
            sliding_window=_sliding_window(values, family),
            num_layers=values.whole("num_hidden_layers"),
            hidden_size=hidden,
            num_attention_heads=heads,
            num_kv_heads=values.whole(
                "num_key_value_heads", heads if family.kv_heads_default else None, nullable=family.kv_heads_default
            ),
            intermediate_size=values.whole("intermediate_size"),
            vocab_size=values.whole("vocab_size"),
            rope_theta=_rope_theta(values, family),
            layers_without_rope=_layers_without_rope(values, family),
            rope_scaling=_rope_scaling(values),
            norm_eps=values.number("rms_norm_eps", family.norm_eps_default),
            attention_bias=family.attention_bias and values.flag("attention_bias"),
            tied_embeddings=values.flag("tie_word_embeddings", family.tied_default),
        )


def _without_neutral(values: Values) -> Values:
    """Without the keys that our model does not know and that are set to what it computes anyway.

    Raises:
        CheckpointError: a multiplier or a switch is set to something else, even if to nothing.
    """
    kept = {key: value for key, value in values.content.items() if not _neutral(key, value)}
    for key, value in kept.items():
        if (key in _MULTIPLIERS and value is not None) or key in _SWITCHES:
            raise values.unknown(key)
    return Values(values.path, kept)


def _neutral(key: str, value: Any) -> bool:
    """Whether a key that our model does not know is set to what it computes anyway."""
    if key in _SWITCHES:
        return value is True
    full = key == "layer_types" and isinstance(value, list) and set(map(str, value)) <= {"full_attention"}
    return full or (key in _MULTIPLIERS | _COUNTS and type(value) in (int, float) and value == 1)


def _refuse_other_models(path: str, name: Any, config: Mapping[str, Any]) -> None:
    """Refuse other families and quantized weights as such: of their keys, that one is to be removed would mislead."""
    if name not in tuple(FAMILIES):  # whatever its type
        raise CheckpointError(f"{path}: model_type is {name!r}, but only {', '.join(FAMILIES)} are supported")
    if name == "mistral" and "layer_types" in config:
        raise CheckpointError(
            f"{path}: model_type is mistral with layer_types, which transformers takes for a ministral, whose "
            "layers have windows of their own: remove layer_types if it is none"
        )
    for key in _QUANTIZED:
        if config.get(key):
            raise CheckpointError(
                f"{path}: {key} is {shown(config[key])}: quantized weights are not read. Give the original ones, or "
                "dequantize them first, where transformers can: AutoModelForCausalLM.from_pretrained(FOLDER)"
                ".dequantize().save_pretrained(OTHER)"
            )


def _family(values: Values, name: Any) -> Family:
    """The model's family; refuses what our model would compute in another way."""
    expected: dict[str, Any] = {"hidden_act": "silu"}
    found = {key: values.content.get(key) for key in expected}
    biased = () if FAMILIES[name].attention_bias else ("attention_bias",)
    for key in (*biased, "mlp_bias", "use_sliding_window"):
        found[key], expected[key] = values.flag(key), False
    if name in ("qwen2", "qwen3") and found["use_sliding_window"]:  # which layers from max_window_layers on have
        first = values.whole("max_window_layers", _MAX_WINDOW_LAYERS, least=0)
        found["use_sliding_window"] = first < values.whole("num_hidden_layers")
    for key, value in expected.items():
        if found[key] not in (None, value):
            raise CheckpointError(f"{values.path}: {key} is {found[key]!r}, but only {value!r} is supported")
    return FAMILIES[name]


def _sliding_window(values: Values, family: Family) -> int | None:
    """How far attention reaches back; None: over all positions."""
    if family.sliding_window is None or values.content.get("sliding_window", 0) is None:
        return None
    return values.whole("sliding_window", family.sliding_window)


def _layers_without_rope(values: Values, family: Family) -> tuple[int, ...]:
    """Numbers of the layers whose queries and keys are not rotated."""
    if family.no_rope_interval is None:
        return ()
    layers = values.whole("num_hidden_layers")
    rotated = values.content.get("no_rope_layers")
    if rotated is None:
        interval = values.whole("no_rope_layer_interval", family.no_rope_interval)
        return tuple(range(interval - 1, layers, interval))
    if not isinstance(rotated, list) or len(rotated) < layers or not set(rotated) <= {0, 1}:
        raise values.wrong("no_rope_layers", f"for each of {layers} layers 1 (rotary positions) or 0 (none)")
    return tuple(number for number in range(layers) if not rotated[number])


def _rope_parts(values: Values) -> list[Values]:
    """What transformers 5 (rope_parameters) and those before it (rope_scaling) say, where they say anything."""
    parts = [values.section(key) for key in ("rope_parameters", "rope_scaling")]
    parts = [_without_neutral(part) for part in parts]
    for part in parts:
        kind = part.content.get("rope_type", part.content.get("type", "default"))
        if kind != "default" and kind not in _SCALINGS:
            raise CheckpointError(
                f"{part.path}: RoPE positions are scaled ({kind}), which this model does not do (it knows "
                f"{', '.join(_SCALINGS)}): the weights would compute something else here"
            )
        part.check_known(_ROPE_KEYS)
    return [part for part in parts if part.content]


def _rope_theta(values: Values, family: Family) -> float:
    """The RoPE base, from transformers 5's rope_parameters or the top level.

    Raises:
        CheckpointError: two bases are given, or null, which is no base and no default either.
    """
    said = [part for part in (*_rope_parts(values), values) if "rope_theta" in part.content]
    # Null at the top level does not matter where the section that comes first has a base.
    given = [part for part in said if part is not values or len(said) == 1 or part.content["rope_theta"] is not None]
    bases = {part.number("rope_theta") for part in given}
    if len(bases) > 1:
        raise CheckpointError(f"{values.path} gives two RoPE bases, {sorted(bases)}")
    return bases.pop() if bases else family.rope_theta_default


def _rope_scaling(values: Values) -> RopeScalingConfig | None:
    """How positions are scaled; None: not at all.

    Raises:
        CheckpointError: in two ways.
    """
    found = [_scaling_of(part) for part in _rope_parts(values)]
    # transformers lets rope_scaling win, with which older files are extended; one that takes a scaling back is a doubt.
    if found and found[0] is not None and found[-1] != found[0]:
        raise CheckpointError(f"{values.path}: rope_parameters and rope_scaling differ, {found[0]} and {found[-1]}")
    return found[-1] if found else None


def _scaling_of(part: Values) -> RopeScalingConfig | None:
    """How a section scales positions; None: not at all."""
    kind = part.content.get("rope_type", part.content.get("type", "default"))
    if kind == "default":
        return None
    names = [name for name in RopeScalingConfig.model_fields if part.content.get(name) is not None]
    given = {name: part.number(name) for name in names if name != "rope_type"}
    return RopeScalingConfig.model_validate(given | {"rope_type": kind})


def rope_scaling(model: ModelConfig) -> dict[str, Any]:
    """The scaling of positions as config.json has it; empty: none."""
    return {} if model.rope_scaling is None else model.rope_scaling.model_dump(exclude_none=True)


def positions(model: ModelConfig, sequence_length: int) -> int:
    """How many positions config.json gives the model.

    Of yarn's, those that it extends to, however long the sequences of a training are: transformers 4 takes the factor
    from them, whatever rope_scaling says, and computes another model where they are fewer or more.
    """
    scaling = model.rope_scaling
    if scaling is None or scaling.rope_type != "yarn" or scaling.original_max_position_embeddings is None:
        return sequence_length
    return round(scaling.factor * scaling.original_max_position_embeddings)


def transformers_config(model: ModelConfig, sequence_length: int, **further: Any) -> Any:
    """transformers' configuration of the model; `further` fields are passed on."""
    from transformers import AutoConfig

    if model.attention_bias:
        further["attention_bias"] = True
    if model.differences.sliding_window is not None:
        further["sliding_window"] = model.sliding_window
    if model.differences.no_rope_interval is not None:
        further["no_rope_layers"] = [int(n not in model.layers_without_rope) for n in range(model.num_layers)]
    return AutoConfig.for_model(
        model.family,
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.intermediate_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        rms_norm_eps=model.norm_eps,
        max_position_embeddings=positions(model, sequence_length),
        rope_parameters={"rope_type": "default", "rope_theta": model.rope_theta} | rope_scaling(model),
        tie_word_embeddings=model.tied_embeddings,
        **further,
    )


def config_files(
    model: ModelConfig, sequence_length: int, dtype: torch.dtype, special: SpecialIds | None = None
) -> dict[str, str]:
    """config.json and generation_config.json by name; `special` gives the special ids, of which none is invented.

    transformers 5 keeps the RoPE base in rope_parameters; versions before 5, and tools modelled on them, read
    rope_theta, rope_scaling and torch_dtype at the top level, so both are given.
    """
    special = special or SpecialIds()
    name = str(dtype).removeprefix("torch.")
    nothing = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    architecture = f"{model.differences.classes}ForCausalLM"
    config = transformers_config(model, sequence_length, architectures=[architecture], dtype=name, **nothing)
    content = json.loads(config.to_json_string()) | {"rope_theta": model.rope_theta, "torch_dtype": name}
    content |= special.ids
    if model.rope_scaling is not None:
        content["rope_scaling"] = rope_scaling(model)
    return {
        CONFIG_FILE: json.dumps(content, indent=2, sort_keys=True) + "\n",
        GENERATION_FILE: json.dumps(special.generation_config(), indent=2, sort_keys=True) + "\n",
    }
