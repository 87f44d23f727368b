"""Hugging Face folders: config.json, generation_config.json and safetensors, one file or several with an index."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from math import prod
from typing import Any

import torch

from neox_core.checkpoint.formats.description import described_by
from neox_core.checkpoint.formats.model_weights import Locator, ModelWeights
from neox_core.checkpoint.formats.outputs import OutputFile
from neox_core.checkpoint.formats.tensor_map import Form, Layer, iterate_layers, stored_tensors
from neox_core.config import ModelConfig, RopeScalingConfig
from neox_core.errors import CheckpointError
from neox_core.storage.folders import Folder, Location, open_folder
from neox_core.storage.tensor_reader import open_tensors

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_EMBEDDING, _OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
_ROPE_TABLE = "rotary_emb.inv_freq"
_DEFAULT_ROPE_THETA = 10000.0
_SCALINGS = ("linear", "llama3")


class HuggingFaceCheckpoint:
    """A Llama folder in Hugging Face's format, checked when opened; values are read from disk only when asked for.

    Raises:
        CheckpointError: a file is missing or damaged, the model is not a Llama that we can express, names are missing
            or unknown, or shapes are not what config.json promises.
    """

    def __init__(self, location: Location) -> None:
        self.folder = folder = open_folder(location)
        config = _read_json(folder, CONFIG_FILE)
        self.model = _model_config(f"{folder}/{CONFIG_FILE}", config)
        tensors = {name: tensor for name, tensor in _open_all(folder).items() if not name.endswith(_ROPE_TABLE)}
        if config.get("tie_word_embeddings") and _OUTPUT not in tensors:
            tensors[_OUTPUT] = tensors.get(_EMBEDDING)
        locator = Locator(str(folder), self.model, Form.HUGGINGFACE, 1)
        locator.add(0, lambda _, name: tensors.get(name))
        self.weights: ModelWeights = locator.weights()
        if unknown := sorted(tensors.keys() - self.weights.places.keys()):
            raise CheckpointError(
                f"{folder} holds {', '.join(unknown[:3])} ({len(unknown)} in all), unknown in a Llama of "
                f"{self.model.num_layers} layers"
            )


def _read_json(folder: Folder, name: str) -> dict[str, Any]:
    path = f"{folder}/{name}"
    try:
        content = json.loads(folder.read_text(name))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist: is {folder} a checkpoint in Hugging Face's format?") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not {type(content).__name__}")
    return content


def _open_all(folder: Folder) -> dict[str, Any]:
    """All tensors of the folder's safetensors files."""
    there = folder.names()
    if INDEX_FILE not in there:
        if WEIGHTS_FILE not in there:
            raise CheckpointError(
                f"{folder} holds neither {WEIGHTS_FILE} nor {INDEX_FILE}: weights in other formats (.bin) are not "
                "read, because they are pickles; save them as safetensors"
            )
        return open_tensors(folder.content(WEIGHTS_FILE))
    index = _read_json(folder, INDEX_FILE).get("weight_map")
    if not isinstance(index, dict):
        raise CheckpointError(f"{folder}/{INDEX_FILE} has no weight_map")
    files = {name: open_tensors(folder.content(name)) for name in sorted(set(index.values()))}
    if missing := [name for name, file in index.items() if name not in files[file]]:
        raise CheckpointError(f"{folder}/{index[missing[0]]} lacks {missing[0]}, which {INDEX_FILE} promises")
    return {name: files[file][name] for name, file in index.items()}


def _model_config(path: str, config: Mapping[str, Any]) -> ModelConfig:
    with described_by(path):
        hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
        _check_expressible(path, config, hidden // heads)
        return ModelConfig(
            num_layers=int(config["num_hidden_layers"]),
            hidden_size=hidden,
            num_attention_heads=heads,
            num_kv_heads=int(config.get("num_key_value_heads") or heads),
            intermediate_size=int(config["intermediate_size"]),
            vocab_size=int(config["vocab_size"]),
            rope_theta=_rope_theta(path, config),
            rope_scaling=_rope_scaling(path, config),
            norm_eps=config.get("rms_norm_eps", 1e-6),
        )


def _check_expressible(path: str, config: Mapping[str, Any], head_dim: int) -> None:
    """Refuse what our model would compute in another way."""
    expected = {
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "head_dim": head_dim,
    }
    for key, value in expected.items():
        if config.get(key) not in (None, value):
            raise CheckpointError(f"{path}: {key} is {config[key]!r}, but only {value!r} is supported")


def _rope_parts(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What transformers 5 (rope_parameters) and those before it (rope_scaling) say, where they say anything."""
    return [config[key] for key in ("rope_parameters", "rope_scaling") if config.get(key)]


def _rope_theta(path: str, config: Mapping[str, Any]) -> float:
    """The RoPE base, from transformers 5's rope_parameters or the top level.

    Raises:
        CheckpointError: two bases are given.
    """
    bases = {float(part["rope_theta"]) for part in (*_rope_parts(config), config) if part.get("rope_theta")}
    if len(bases) > 1:
        raise CheckpointError(f"{path} gives two RoPE bases, {sorted(bases)}")
    return bases.pop() if bases else _DEFAULT_ROPE_THETA


def _rope_scaling(path: str, config: Mapping[str, Any]) -> RopeScalingConfig | None:
    """How positions are scaled; None: not at all.

    Raises:
        CheckpointError: in a way that our model does not know, or in two ways.
    """
    found: list[RopeScalingConfig] = []
    for part in _rope_parts(config):
        kind = part.get("rope_type", part.get("type", "default"))
        if kind == "default":
            continue
        if kind not in _SCALINGS:
            raise CheckpointError(
                f"{path}: RoPE positions are scaled ({kind}), which this model does not do (it knows "
                f"{' and '.join(_SCALINGS)}): the weights would compute something else here"
            )
        values = {name: part.get(name) for name in RopeScalingConfig.model_fields}
        found.append(RopeScalingConfig.model_validate(values | {"rope_type": kind}))
    if any(scaling != found[0] for scaling in found):
        raise CheckpointError(f"{path}: rope_parameters and rope_scaling differ, {found[0]} and {found[1]}")
    return found[0] if found else None


def huggingface_files(weights: ModelWeights, model: ModelConfig, dtype: torch.dtype, limit: int) -> list[OutputFile]:
    """The files of weights: one, or several of whole layers that stay under `limit` bytes where one layer does."""
    groups = list(_group(list(iterate_layers(model.num_layers)), model, dtype.itemsize, limit))
    names = (
        [WEIGHTS_FILE]
        if len(groups) == 1
        else [f"model-{number:05d}-of-{len(groups):05d}.safetensors" for number in range(1, len(groups) + 1)]
    )
    return [
        OutputFile(
            name,
            [
                weights.as_stored(layout, dtype)
                for layer in group
                for layout in stored_tensors(layer, model, Form.HUGGINGFACE)
            ],
        )
        for name, group in zip(names, groups, strict=True)
    ]


def index_file(files: list[OutputFile]) -> str:
    """The index of several files of weights, as JSON."""
    places = {tensor.name: file.path for file in files for tensor in file.tensors}
    size = sum(tensor.nbytes for file in files for tensor in file.tensors)
    return json.dumps({"metadata": {"total_size": size}, "weight_map": places}, indent=2, sort_keys=True)


def _group(layers: list[Layer], model: ModelConfig, itemsize: int, limit: int) -> Iterator[list[Layer]]:
    """Layers in order, in groups that stay under `limit` bytes where a single layer does."""
    group: list[Layer] = []
    size = 0
    for layer in layers:
        more = itemsize * sum(prod(tensor.shape(model)) for tensor in layer.tensors)
        if group and size + more > limit:
            yield group
            group, size = [], 0
        group.append(layer)
        size += more
    yield group


def rope_scaling(model: ModelConfig) -> dict[str, Any]:
    """The scaling of positions as config.json has it; empty: none."""
    return {} if model.rope_scaling is None else model.rope_scaling.model_dump(exclude_none=True)


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
        rope_parameters={"rope_type": "default", "rope_theta": model.rope_theta} | rope_scaling(model),
        tie_word_embeddings=False,
        **further,
    )


def config_files(
    model: ModelConfig, sequence_length: int, dtype: torch.dtype, special: Mapping[str, int] | None = None
) -> dict[str, str]:
    """config.json and generation_config.json by name; `special` gives bos_token_id and eos_token_id.

    transformers 5 keeps the RoPE base in rope_parameters; versions before 5, and tools modelled on them, read
    rope_theta, rope_scaling and torch_dtype at the top level, so both are given.
    """
    from transformers import GenerationConfig

    ids = dict(special or {})
    name = str(dtype).removeprefix("torch.")
    config = llama_config(model, sequence_length, architectures=["LlamaForCausalLM"], dtype=name, **ids)
    content = json.loads(config.to_json_string()) | {"rope_theta": model.rope_theta, "torch_dtype": name}
    if model.rope_scaling is not None:
        content["rope_scaling"] = rope_scaling(model)
    return {
        CONFIG_FILE: json.dumps(content, indent=2, sort_keys=True) + "\n",
        "generation_config.json": GenerationConfig(**ids).to_json_string(),
    }
