"""A random base model in Meta's format, so that the whole chain can run without anyone's weights."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from torch import Tensor

from neox_core.artifact import write_atomically
from neox_core.checkpoint.files import save_file
from neox_core.checkpoint.layout import Layer, TensorLayout, iterate_layers, slice_of
from neox_core.checkpoint.meta import PARAMS_FILE, intermediate_size, shard_name
from neox_core.config import ModelConfig
from neox_core.errors import ConfigError

_STD = 0.02
"""Standard deviation of the weights at initialisation (GPT-2's)."""
_WRITES_TO_RESIDUAL = ("attention.wo.weight", "feed_forward.w2.weight")


def make_random_base(model: ModelConfig, folder: Path, seed: int, shards: int = 2) -> None:
    """Write random weights as params.json (last) and `shards` consolidated.NN.pth files.

    bf16; normal with standard deviation 0.02; what writes to the residual stream is scaled by 1/sqrt(2·layers), so
    that the stream's variance does not grow with depth (GPT-2); norms are ones. Equal seeds give equal weights, for
    any number of shards.

    Raises:
        ConfigError: the model cannot be cut into that many shards.
    """
    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, Tensor] = {}
    splits: dict[str, int | None] = {}
    for layer in iterate_layers(model.num_layers):
        for tensor in layer.tensors:
            name = layer.meta_name(tensor)
            weights[name] = _random(layer, tensor, model, generator)
            splits[name] = tensor.meta_split
    write_meta(folder, model, weights, splits, shards)


def write_meta(
    folder: Path, model: ModelConfig, weights: dict[str, Tensor], splits: dict[str, int | None], shards: int
) -> None:
    """Write whole tensors, given by Meta's names, as a checkpoint in Meta's format; params.json comes last.

    Raises:
        ConfigError: a tensor cannot be cut into that many shards.
    """
    for name, weight in weights.items():
        split = splits[name]
        if split is not None and weight.shape[split] % shards:
            raise ConfigError(f"{shards} shards do not divide {name} {tuple(weight.shape)} along dimension {split}")
    for shard in range(shards):
        content = {name: slice_of(weight, splits[name], shards, shard) for name, weight in weights.items()}
        save_file(folder / shard_name(shard), content)
    write_atomically(folder / PARAMS_FILE, json.dumps(meta_params(model), indent=1))


def meta_params(model: ModelConfig) -> dict[str, int | float]:
    """The params.json of a model."""
    return {
        "dim": model.hidden_size,
        "n_layers": model.num_layers,
        "n_heads": model.num_attention_heads,
        "n_kv_heads": model.num_kv_heads,
        **_mlp_params(model),
        "norm_eps": model.norm_eps,
        "rope_theta": model.rope_theta,
        "vocab_size": model.vocab_size,
    }


def _mlp_params(model: ModelConfig) -> dict[str, int | float]:
    """Values of Meta's formula that give the model's intermediate size; it has no entry of its own in params.json."""
    for multiple_of in (256, 128, 64, 32, 16, 8, 4, 2, 1):
        if intermediate_size(model.hidden_size, multiple_of, None) == model.intermediate_size:
            return {"multiple_of": multiple_of}
    unscaled = intermediate_size(model.hidden_size, 1, None)
    # The formula rounds down: aim at the middle of the unit, so that no float error can reach a neighbour.
    return {"multiple_of": 1, "ffn_dim_multiplier": (model.intermediate_size + 0.5) / unscaled}


def _random(layer: Layer, tensor: TensorLayout, model: ModelConfig, generator: torch.Generator) -> Tensor:
    shape = tensor.shape(model)
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    scale = 1 / math.sqrt(2 * model.num_layers) if tensor.meta in _WRITES_TO_RESIDUAL else 1.0
    return (torch.randn(shape, generator=generator) * (_STD * scale)).to(torch.bfloat16)
