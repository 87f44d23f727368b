"""A random base model in Meta's format, so that the whole chain can run without anyone's weights."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from neox_core.checkpoint.formats.meta_params import meta_params
from neox_core.checkpoint.formats.model_files import PARAMS_FILE, shard_name
from neox_core.checkpoint.formats.tensor_map import Form, TensorLayout, check_divides, iterate_layers, stored_tensors
from neox_core.config import ModelConfig
from neox_core.storage.atomic import atomic_file, write_atomically
from neox_core.storage.tensor_writer import StreamedTensor, write_torch

MOST_SHARDS = 2
"""Of a base whose number of shards is not given."""
_STD = 0.02
"""Standard deviation of the weights at initialisation (GPT-2's)."""
_WRITES_TO_RESIDUAL = ("attention.wo.weight", "feed_forward.w2.weight")


def make_random_base(model: ModelConfig, folder: Path, seed: int, shards: int | None = None) -> None:
    """Write random weights as params.json (last) and `shards` consolidated.NN.pth files.

    bf16; normal with standard deviation 0.02; what writes to the residual stream is scaled by 1/sqrt(2·layers), so
    that the stream's variance does not grow with depth (GPT-2); norms are ones. Equal seeds give equal weights, for
    any number of shards. Memory: one tensor, in fp32; every shard draws all weights anew.

    Args:
        shards: None: two, so that toys try what large models need, or one where two do not divide the model.

    Raises:
        ConfigError: the model cannot be cut into that many shards, or Meta's format cannot hold it.
    """
    params = json.dumps(meta_params(model), indent=1)
    shards = shards or math.gcd(MOST_SHARDS, model.num_kv_heads, model.intermediate_size, model.vocab_size)
    check_divides(model, shards, "shards")
    shards = math.gcd(shards, model.num_kv_heads)  # Meta's shards never have a KV head in common
    for shard in range(shards):
        tensors = list(_shard(model, seed, shards, shard))
        with atomic_file(folder / shard_name(shard)) as temporary:
            _save(tensors, temporary)
    write_atomically(folder / PARAMS_FILE, params)


def _save(tensors: list[StreamedTensor], path: Path) -> None:
    with path.open("wb") as file, ThreadPoolExecutor(1) as in_order:
        write_torch(file, tensors, in_order)


def _shard(model: ModelConfig, seed: int, shards: int, shard: int) -> Iterator[StreamedTensor]:
    """A shard's tensors; they must be written in this order, in which the generator draws them."""
    generator = torch.Generator().manual_seed(seed)
    for layer in iterate_layers(model):
        for tensor, stored in zip(layer.tensors, stored_tensors(layer, model, Form.META, shards, shard), strict=True):
            size = stored.shape[tensor.meta_split or 0]
            start = 0 if tensor.meta_split is None else shard * size
            fill = _drawn(tensor, model, generator, slice(start, start + size))
            yield StreamedTensor(stored.name, stored.shape, torch.bfloat16, fill)


def _drawn(
    tensor: TensorLayout, model: ModelConfig, generator: torch.Generator, part: slice
) -> Callable[[Tensor, int], None]:
    drawn: list[Tensor] = []

    def fill(out: Tensor, first: int) -> None:
        if first == 0:
            whole = _random(tensor, model, generator)
            cut = whole[part] if tensor.meta_split == 0 else whole[..., part]
            drawn[:] = [cut.reshape(-1, out.shape[1])]
        out.copy_(drawn[0][first : first + len(out)])
        if first + len(out) == len(drawn[0]):
            drawn.clear()

    return fill


def _random(tensor: TensorLayout, model: ModelConfig, generator: torch.Generator) -> Tensor:
    shape = tensor.shape(model)
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    scale = 1 / math.sqrt(2 * model.num_layers) if tensor.meta in _WRITES_TO_RESIDUAL else 1.0
    return (torch.randn(shape, generator=generator) * (_STD * scale)).to(torch.bfloat16)
