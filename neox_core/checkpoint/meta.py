"""Meta's raw checkpoints (Llama, CodeLlama): params.json and consolidated.NN.pth, one file per model-parallel shard."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from neox_core.checkpoint.files import load_file
from neox_core.checkpoint.layout import TensorLayout, concatenate, iterate_layers
from neox_core.config import ModelConfig
from neox_core.errors import CheckpointError

PARAMS_FILE = "params.json"
_SHARD = re.compile(r"consolidated\.(\d+)\.pth")
_ROPE_TABLE = "rope.freqs"
"""A table that follows from rope_theta: there per layer, once or not at all, and never a weight."""
_DEFAULT_NORM_EPS = 1e-5
_DEFAULT_MULTIPLE_OF = 256
_DEFAULT_ROPE_THETA = 10000.0


def shard_name(shard: int) -> str:
    """File name of a shard."""
    return f"consolidated.{shard:02d}.pth"


def intermediate_size(hidden_size: int, multiple_of: int, ffn_dim_multiplier: float | None) -> int:
    """Width of the MLP as Meta's model computes it: 2/3 of 4·hidden, scaled, rounded up to a multiple."""
    size = int(2 * (4 * hidden_size) / 3)
    size = size if ffn_dim_multiplier is None else int(ffn_dim_multiplier * size)
    return multiple_of * ((size + multiple_of - 1) // multiple_of)


@dataclass(frozen=True)
class _Place:
    """A tensor's entry in the layout and its full shape."""

    layout: TensorLayout
    shape: tuple[int, ...]


class MetaCheckpoint:
    """A folder in Meta's format, checked when opened; tensors are read from disk only when asked for.

    Raises:
        CheckpointError: the folder, params.json or a shard is missing or damaged, names are missing or unknown, or
            the tensors' shapes or types are not what params.json promises.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        params = _read_params(folder)
        self._shards = [load_file(path) for path in _shard_paths(folder)]
        self.model = _model_config(folder, params, self._shards)
        self._places = {
            layer.meta_name(tensor): _Place(tensor, tensor.shape(self.model))
            for layer in iterate_layers(self.model.num_layers)
            for tensor in layer.tensors
        }
        for number, shard in enumerate(self._shards):
            self._check_names(number, shard)
            self._check_tensors(number, shard)

    @property
    def num_shards(self) -> int:
        """Number of consolidated.NN.pth files."""
        return len(self._shards)

    def tensor(self, name: str) -> Tensor:
        """A whole tensor by Meta's name, merged over the shards; rows of wq and wk are in Meta's order."""
        parts = [shard[name] for shard in self._shards]
        return concatenate(parts, self._places[name].layout.meta_split, f"{self.folder}: {name}")

    def _check_names(self, number: int, shard: Mapping[str, Any]) -> None:
        found = {name for name in shard if not name.endswith(_ROPE_TABLE)}
        path = self.folder / shard_name(number)
        if missing := sorted(self._places.keys() - found):
            raise CheckpointError(f"{path} lacks {_some(missing)}, which {self.model.num_layers} layers need")
        if unknown := sorted(found - self._places.keys()):
            raise CheckpointError(
                f"{path} holds {_some(unknown)}, unknown in a Llama of {self.model.num_layers} layers"
            )

    def _check_tensors(self, number: int, shard: Mapping[str, Any]) -> None:
        path = self.folder / shard_name(number)
        for name, place in self._places.items():
            tensor = shard[name]
            if not isinstance(tensor, Tensor) or tensor.dtype != torch.bfloat16:
                kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
                raise CheckpointError(f"{path}: {name} is {kind}; the weights must be torch.bfloat16")
            self._check_shape(path, name, place, tuple(tensor.shape))

    def _check_shape(self, path: Path, name: str, place: _Place, actual: tuple[int, ...]) -> None:
        split, whole = place.layout.meta_split, list(actual)
        if split is not None and split < len(whole):
            whole[split] *= self.num_shards
        if tuple(whole) != place.shape:
            raise CheckpointError(
                f"{path}: {name} has shape {actual}, which makes {tuple(whole)} over {self.num_shards} shards, but "
                f"{PARAMS_FILE} says {place.shape}: shards are missing or surplus, or {PARAMS_FILE} is another model's"
            )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more}"


def _read_params(folder: Path) -> dict[str, Any]:
    path = folder / PARAMS_FILE
    if not folder.is_dir():
        raise CheckpointError(f"checkpoint folder {folder} does not exist")
    try:
        params = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{folder} holds no {PARAMS_FILE}: is it a checkpoint in Meta's format?") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(params, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not {type(params).__name__}")
    return params


def _shard_paths(folder: Path) -> list[Path]:
    """The shards in order.

    Raises:
        CheckpointError: there are none, or their numbers have a gap.
    """
    numbers = {int(match[1]) for path in folder.iterdir() if (match := _SHARD.fullmatch(path.name))}
    if not numbers:
        raise CheckpointError(f"{folder} holds no {shard_name(0)}")
    paths = [folder / shard_name(number) for number in range(max(numbers) + 1)]
    if missing := [path.name for path in paths if not path.is_file()]:
        raise CheckpointError(f"{folder} lacks {_some(missing)} of {len(paths)} shards: copy all of them")
    return paths


def _model_config(folder: Path, params: Mapping[str, Any], shards: list[dict[str, Any]]) -> ModelConfig:
    path = folder / PARAMS_FILE
    try:
        hidden, heads = int(params["dim"]), int(params["n_heads"])
        return ModelConfig(
            num_layers=int(params["n_layers"]),
            hidden_size=hidden,
            num_attention_heads=heads,
            num_kv_heads=int(params.get("n_kv_heads") or heads),
            intermediate_size=intermediate_size(
                hidden, int(params.get("multiple_of", _DEFAULT_MULTIPLE_OF)), params.get("ffn_dim_multiplier")
            ),
            vocab_size=_vocab_size(folder, params, shards),
            rope_theta=params.get("rope_theta", _DEFAULT_ROPE_THETA),
            norm_eps=params.get("norm_eps", _DEFAULT_NORM_EPS),
        )
    except KeyError as error:
        raise CheckpointError(f"{path} lacks {error}") from None
    except ValidationError as error:
        problem = error.errors()[0]
        raise CheckpointError(f"{path}: {'.'.join(map(str, problem['loc']))} {problem['msg']}".strip()) from None
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(f"{path} has a value that is not a number of the right kind: {error}") from None


def _vocab_size(folder: Path, params: Mapping[str, Any], shards: list[dict[str, Any]]) -> int:
    """The vocabulary of params.json, or, where that leaves it open (absent or -1), the embedding's rows."""
    stated = int(params.get("vocab_size", -1))
    if stated != -1:
        return stated
    embedding = shards[0].get("tok_embeddings.weight")
    if not isinstance(embedding, Tensor):
        raise CheckpointError(f"{folder / shard_name(0)} lacks tok_embeddings.weight")
    return embedding.shape[0]
