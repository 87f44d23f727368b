"""Meta's raw checkpoints (Llama, CodeLlama): params.json and consolidated.NN.pth, one file per model-parallel shard."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from neox_core.checkpoint.formats.meta_params import read_params
from neox_core.checkpoint.formats.model_files import PARAMS_FILE, meta_files_of, read_json, shard_name, some
from neox_core.checkpoint.formats.model_weights import Locator, ModelWeights, layouts_of
from neox_core.checkpoint.formats.outputs import OutputFile
from neox_core.checkpoint.formats.tensor_map import Form, check_divides
from neox_core.config import ModelConfig
from neox_core.errors import CheckpointError
from neox_core.storage.folders import Folder, Location, open_folder
from neox_core.storage.tensor_reader import StoredTensor, open_tensors

_ROPE_TABLE = "rope.freqs"
"""A table that follows from rope_theta: there per layer, once or not at all, and never a weight."""
_EMBEDDING = "tok_embeddings.weight"


class MetaCheckpoint:
    """A folder in Meta's format, checked when opened; values are read from disk only when asked for.

    Raises:
        CheckpointError: the folder, params.json or a shard is missing or damaged, names are missing or unknown, or
            the tensors' shapes or types are not what params.json promises.
    """

    def __init__(self, location: Location) -> None:
        self.folder = folder = open_folder(location)
        self.files = meta_files_of(folder)
        """The files that belong to it."""
        params = read_json(folder, PARAMS_FILE)
        shards = [open_tensors(folder.content(name)) for name in self.files.weights]
        self.num_shards = len(shards)
        """Number of consolidated.NN.pth files."""
        rows, self.form = _embedding(folder, params, shards)
        self.model = read_params(f"{folder}/{PARAMS_FILE}", params, rows)
        names = {layout.name for _, layout in layouts_of(self.model, self.form)}
        for number, shard in enumerate(shards):
            self._check_names(f"{folder}/{shard_name(number)}", shard, names)
        self._check_parts(shards)
        locator = Locator(str(folder), self.model, self.form, self.num_shards)
        for number, shard in enumerate(shards):
            locator.add(number, partial(_find, shard))
        self.weights: ModelWeights = locator.weights()

    def check_values(self) -> None:
        """Nothing to compare: every tensor is there once."""

    def tensor(self, name: str) -> Tensor:
        """A whole tensor by Meta's name, merged over the shards; rows of wq and wk are in Meta's order."""
        layout = next(layout for _, layout in layouts_of(self.model, Form.META) if layout.name == name)
        out = torch.empty(layout.shape, dtype=self.weights.dtype)
        self.weights.as_stored(layout, out.dtype).fill(out.view(-1, out.shape[-1]), 0)
        return out

    def _check_names(self, path: str, shard: Mapping[str, Any], names: set[str]) -> None:
        found = {name for name in shard if not name.endswith(_ROPE_TABLE)}
        if missing := sorted(names - found):
            raise CheckpointError(f"{path} lacks {some(missing)}, which {self.model.num_layers} layers need")
        if unknown := sorted(found - names):
            raise CheckpointError(f"{path} holds {some(unknown)}, unknown in a Llama of {self.model.num_layers} layers")

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


def _embedding(folder: Folder, params: Mapping[str, Any], shards: list[dict[str, Any]]) -> tuple[int, Form]:
    """Rows of the embedding over all shards, and how it is cut: Llama 1 and 2 by columns, Llama 3 by rows."""
    stored = shards[0].get(_EMBEDDING)
    if not isinstance(stored, StoredTensor) or len(stored.shape) != 2:
        raise CheckpointError(f"{folder}/{shard_name(0)} lacks {_EMBEDDING}")
    rows, columns = stored.shape
    if len(shards) > 1 and columns == params.get("dim"):
        return rows * len(shards), Form.META_ROWS
    return rows, Form.META


def _fits(shard: tuple[int, ...], whole: tuple[int, ...], shards: int) -> bool:
    """Whether a shard can be the whole tensor or one of equal cuts along one dimension."""
    if len(shard) != len(whole):
        return False
    if len(whole) == 1:
        return shard == whole
    return any(shard == tuple(n // shards if d == dim else n for d, n in enumerate(whole)) for dim in (0, 1))


def meta_files(weights: ModelWeights, model: ModelConfig, shards: int, dtype: torch.dtype) -> list[OutputFile]:
    """The files of a checkpoint in Meta's format, but for params.json; the embedding is cut by columns.

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
