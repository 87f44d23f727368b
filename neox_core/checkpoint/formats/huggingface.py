"""Hugging Face folders: config.json, generation_config.json and safetensors, one file or several with an index."""

from __future__ import annotations

import json
from collections.abc import Iterator
from math import prod
from typing import Any

import torch

from neox_core.checkpoint.formats.huggingface_config import read_config
from neox_core.checkpoint.formats.model_files import (
    CONFIG_FILE,
    INDEX_FILE,
    WEIGHTS_FILE,
    ModelFiles,
    huggingface_files_of,
    read_json,
    some,
)
from neox_core.checkpoint.formats.model_weights import Locator, ModelWeights
from neox_core.checkpoint.formats.outputs import OutputFile
from neox_core.checkpoint.formats.tensor_map import Form, Layer, iterate_layers, stored_tensors
from neox_core.config import ModelConfig
from neox_core.errors import CheckpointError
from neox_core.storage.folders import Folder, Location, open_folder
from neox_core.storage.tensor_reader import StoredTensor, open_tensors

_EMBEDDING, _OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
_ROPE_TABLE = "rotary_emb.inv_freq"
_CHECKED_ROWS = 4096


class HuggingFaceCheckpoint:
    """A Llama folder in Hugging Face's format, checked when opened; values are read from disk only when asked for.

    Raises:
        CheckpointError: a file is missing or damaged, the model is not a Llama that we can express, names are missing
            or unknown, or shapes are not what config.json promises.
    """

    def __init__(self, location: Location) -> None:
        self.folder = folder = open_folder(location)
        config = read_json(folder, CONFIG_FILE)
        self.model = read_config(f"{folder}/{CONFIG_FILE}", config)
        self.files = huggingface_files_of(folder)
        """The files that belong to it."""
        tensors = {
            name: tensor for name, tensor in _open_all(folder, self.files).items() if not name.endswith(_ROPE_TABLE)
        }
        self._tied_head: StoredTensor | None = tensors.get(_OUTPUT) if self.model.tied_embeddings else None
        if self.model.tied_embeddings:
            tensors[_OUTPUT] = tensors.get(_EMBEDDING)
        locator = Locator(str(folder), self.model, Form.HUGGINGFACE, 1, hint=f"is {CONFIG_FILE} this model's?")
        locator.add(0, lambda _, name: tensors.get(name))
        self.weights: ModelWeights = locator.weights()
        if unknown := sorted(tensors.keys() - self.weights.places.keys()):
            raise CheckpointError(
                f"{folder} holds {some(unknown)} ({len(unknown)} in all), unknown in a Llama of "
                f"{self.model.num_layers} layers"
            )

    def check_values(self) -> None:
        """Compare the two embeddings of a tied model that has both; reads them.

        Raises:
            CheckpointError: they differ, so that nobody can say which is the output head.
        """
        if self._tied_head is None:
            return
        head, height, width = self._tied_head, self.model.vocab_size, self.model.hidden_size
        same = head.shape == (height, width)
        for start in range(0, height if same else 0, _CHECKED_ROWS):
            rows = range(start, min(start + _CHECKED_ROWS, height))
            embedding = torch.empty(len(rows), width, dtype=torch.float32)
            self.weights.read(_EMBEDDING, rows, range(width), embedding)
            same = same and torch.equal(embedding, head.read(rows, range(width)).float())
        if not same:
            raise CheckpointError(
                f"{self.folder}/{CONFIG_FILE} says tie_word_embeddings, but {_OUTPUT} is not {_EMBEDDING}: set it to "
                f"false if {_OUTPUT} is the output head, or remove {_OUTPUT}"
            )


def _open_all(folder: Folder, found: ModelFiles) -> dict[str, Any]:
    """All tensors of the model's safetensors files."""
    files = {name: open_tensors(folder.content(name)) for name in found.weights}
    if not found.index:
        return files[WEIGHTS_FILE]
    if missing := [name for name, file in found.index.items() if name not in files[file]]:
        raise CheckpointError(f"{folder}/{found.index[missing[0]]} lacks {missing[0]}, which {INDEX_FILE} promises")
    tensors = {name: files[file][name] for name, file in found.index.items()}
    for file, content in files.items():  # which of two a reader takes is its own choice
        if twice := [name for name in content if name in tensors and found.index[name] != file]:
            raise CheckpointError(
                f"{folder} holds {some(twice)} both in {found.index[twice[0]]} and in {file}: are these files of two "
                f"models? Get them all, and {INDEX_FILE}, from one"
            )
    return tensors


def huggingface_files(weights: ModelWeights, model: ModelConfig, dtype: torch.dtype, limit: int) -> list[OutputFile]:
    """The files of weights: one, or several of whole layers that stay under `limit` bytes where one layer does."""
    layers = [layer for layer in iterate_layers(model) if not layer.tied]
    groups = list(_group(layers, model, dtype.itemsize, limit))
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
