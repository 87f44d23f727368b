"""Meta's raw checkpoints (Llama, CodeLlama): params.json and consolidated.NN.pth, one file per model-parallel shard."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from neox_core.checkpoint.formats.description import described_by
from neox_core.checkpoint.formats.model_weights import Locator, ModelWeights, layouts_of
from neox_core.checkpoint.formats.outputs import OutputFile
from neox_core.checkpoint.formats.tensor_map import Form, check_divides
from neox_core.config import ModelConfig, RopeScalingConfig
from neox_core.errors import CheckpointError, ConfigError
from neox_core.storage.folders import Folder, Location, open_folder
from neox_core.storage.tensor_reader import StoredTensor, open_tensors

PARAMS_FILE = "params.json"
_SHARD = re.compile(r"consolidated\.(\d+)\.pth")
_ROPE_TABLE = "rope.freqs"
"""A table that follows from rope_theta: there per layer, once or not at all, and never a weight."""
_DEFAULT_NORM_EPS = 1e-5
_DEFAULT_MULTIPLE_OF = 256
_DEFAULT_ROPE_THETA = 10000.0
_LLAMA3 = RopeScalingConfig(
    rope_type="llama3", factor=8, low_freq_factor=1, high_freq_factor=4, original_max_position_embeddings=8192
)
"""What Meta's code has as constants."""


def shard_name(shard: int) -> str:
    """File name of a shard."""
    return f"consolidated.{shard:02d}.pth"


def intermediate_size(hidden_size: int, multiple_of: int, ffn_dim_multiplier: float | None) -> int:
    """Width of the MLP as Meta's model computes it: 2/3 of 4·hidden, scaled, rounded up to a multiple."""
    size = int(2 * (4 * hidden_size) / 3)
    size = size if ffn_dim_multiplier is None else int(ffn_dim_multiplier * size)
    return multiple_of * ((size + multiple_of - 1) // multiple_of)


class MetaCheckpoint:
    """A folder in Meta's format, checked when opened; values are read from disk only when asked for.

    Raises:
        CheckpointError: the folder, params.json or a shard is missing or damaged, names are missing or unknown, or
            the tensors' shapes or types are not what params.json promises.
    """

    def __init__(self, location: Location) -> None:
        self.folder = folder = open_folder(location)
        params = _read_params(folder)
        shards = [open_tensors(folder.content(name)) for name in _shard_names(folder)]
        self.num_shards = len(shards)
        """Number of consolidated.NN.pth files."""
        self.model = _model_config(folder, params, shards)
        names = {layout.name for _, layout in layouts_of(self.model, Form.META)}
        for number, shard in enumerate(shards):
            self._check_names(f"{folder}/{shard_name(number)}", shard, names)
        self._check_parts(shards)
        locator = Locator(str(folder), self.model, Form.META, self.num_shards)
        for number, shard in enumerate(shards):
            locator.add(number, partial(_find, shard))
        self.weights: ModelWeights = locator.weights()

    def tensor(self, name: str) -> Tensor:
        """A whole tensor by Meta's name, merged over the shards; rows of wq and wk are in Meta's order."""
        layout = next(layout for _, layout in layouts_of(self.model, Form.META) if layout.name == name)
        out = torch.empty(layout.shape, dtype=self.weights.dtype)
        self.weights.as_stored(layout, out.dtype).fill(out.view(-1, out.shape[-1]), 0)
        return out

    def _check_names(self, path: str, shard: Mapping[str, Any], names: set[str]) -> None:
        found = {name for name in shard if not name.endswith(_ROPE_TABLE)}
        if missing := sorted(names - found):
            raise CheckpointError(f"{path} lacks {_some(missing)}, which {self.model.num_layers} layers need")
        if unknown := sorted(found - names):
            raise CheckpointError(
                f"{path} holds {_some(unknown)}, unknown in a Llama of {self.model.num_layers} layers"
            )

    def _check_parts(self, shards: list[dict[str, Any]]) -> None:
        """Shapes over all shards, in the terms of params.json, before anything divides by their number."""
        wholes = {layout.name: layout for _, layout in layouts_of(self.model, Form.META)}
        for number, shard in enumerate(shards):
            for name, layout in wholes.items():
                stored = shard[name]
                if isinstance(stored, StoredTensor) and not _fits(stored.shape, layout.shape, self.num_shards):
                    raise CheckpointError(
                        f"{self.folder}/{shard_name(number)}: {name} has shape {stored.shape} in one of "
                        f"{self.num_shards} shards, but {PARAMS_FILE} says {layout.shape} for the whole: shards are "
                        f"missing or surplus, or {PARAMS_FILE} is another model's"
                    )


def _find(shard: Mapping[str, Any], index: int, name: str) -> object:
    return shard.get(name)


def _fits(shard: tuple[int, ...], whole: tuple[int, ...], shards: int) -> bool:
    """Whether a shard can be the whole tensor or one of equal cuts along one dimension."""
    if len(shard) != len(whole):
        return False
    if len(whole) == 1:
        return shard == whole
    return any(shard == tuple(n // shards if d == dim else n for d, n in enumerate(whole)) for dim in (0, 1))


def meta_files(weights: ModelWeights, model: ModelConfig, shards: int, dtype: torch.dtype) -> list[OutputFile]:
    """The files of a checkpoint in Meta's format, but for params.json.

    Raises:
        ConfigError: the model cannot be cut into that many shards.
    """
    check_divides(model, shards, "shards")
    return [
        OutputFile(
            shard_name(shard),
            [weights.as_stored(layout, dtype) for _, layout in layouts_of(model, Form.META, shards, shard)],
        )
        for shard in range(shards)
    ]


def meta_params(model: ModelConfig) -> dict[str, Any]:
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
        **_scaling_params(model),
    }


def _mlp_params(model: ModelConfig) -> dict[str, int | float]:
    """Values of Meta's formula that give the model's intermediate size; it has no entry of its own in params.json."""
    for multiple_of in (256, 128, 64, 32, 16, 8, 4, 2, 1):
        if intermediate_size(model.hidden_size, multiple_of, None) == model.intermediate_size:
            return {"multiple_of": multiple_of}
    unscaled = intermediate_size(model.hidden_size, 1, None)
    # The formula rounds down: aim at the middle of the unit, so that no float error can reach a neighbour.
    return {"multiple_of": 1, "ffn_dim_multiplier": (model.intermediate_size + 0.5) / unscaled}


def _some(names: list[str]) -> str:
    """The first names of a list."""
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def _read_params(folder: Folder) -> dict[str, Any]:
    path = f"{folder}/{PARAMS_FILE}"
    if not folder.exists():
        raise CheckpointError(f"checkpoint folder {folder} does not exist")
    try:
        params = json.loads(folder.read_text(PARAMS_FILE))
    except FileNotFoundError:
        raise CheckpointError(f"{folder} holds no {PARAMS_FILE}: is it a checkpoint in Meta's format?") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(params, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not {type(params).__name__}")
    return params


def _shard_names(folder: Folder) -> list[str]:
    """The shards in order.

    Raises:
        CheckpointError: there are none, or their numbers have a gap.
    """
    numbers = {int(match[1]) for name in folder.names() if (match := _SHARD.fullmatch(name))}
    if not numbers:
        raise CheckpointError(f"{folder} holds no {shard_name(0)}")
    if missing := [shard_name(number) for number in range(max(numbers) + 1) if number not in numbers]:
        raise CheckpointError(f"{folder} lacks {_some(missing)} of {max(numbers) + 1} shards: copy all of them")
    return [shard_name(number) for number in sorted(numbers)]


def _model_config(folder: Folder, params: Mapping[str, Any], shards: list[dict[str, Any]]) -> ModelConfig:
    with described_by(f"{folder}/{PARAMS_FILE}"):
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
            rope_scaling=_rope_scaling(folder, params),
            norm_eps=params.get("norm_eps", _DEFAULT_NORM_EPS),
        )


def _rope_scaling(folder: Folder, params: Mapping[str, Any]) -> RopeScalingConfig | None:
    """Llama 3's scaling of positions, of which params.json has a switch and not always the numbers."""
    if not params.get("use_scaled_rope"):
        return None
    if "rope_scaling_factor" not in params:
        raise CheckpointError(
            f"{folder}/{PARAMS_FILE} says use_scaled_rope without rope_scaling_factor: add it (Llama 3.1: 8, 3.2: 32)"
        )
    return _LLAMA3.model_copy(
        update={
            "factor": float(params["rope_scaling_factor"]),
            "high_freq_factor": float(params.get("high_freq_factor") or 4.0),
        }
    )


def _scaling_params(model: ModelConfig) -> dict[str, Any]:
    """The entries of params.json that say how positions are scaled.

    Raises:
        ConfigError: in a way that Meta's format has no words for.
    """
    scaling = model.rope_scaling
    if scaling is None:
        return {}
    same = {"factor": scaling.factor, "high_freq_factor": scaling.high_freq_factor}
    if scaling != _LLAMA3.model_copy(update=same):
        raise ConfigError(f"Meta's format cannot say that positions are scaled by {scaling}: export to Hugging Face's")
    return {
        "use_scaled_rope": True,
        "rope_scaling_factor": scaling.factor,
        "high_freq_factor": scaling.high_freq_factor,
    }


def _vocab_size(folder: Folder, params: Mapping[str, Any], shards: list[dict[str, Any]]) -> int:
    """The vocabulary of params.json, or, where that leaves it open (absent or -1), the embedding's rows."""
    stated = int(params.get("vocab_size", -1))
    if stated != -1:
        return stated
    embedding = shards[0].get("tok_embeddings.weight")
    if not isinstance(embedding, StoredTensor):
        raise CheckpointError(f"{folder}/{shard_name(0)} lacks tok_embeddings.weight")
    return embedding.shape[0]
