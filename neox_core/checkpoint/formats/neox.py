"""NeoX checkpoints: the form without pipeline (one file per rank), and with (one file per layer and rank).

    <dir>/latest                                                "global_stepN"
    <dir>/global_stepN/mp_rank_RR_model_states.pt               {"module": {"sequential.{i}.{name}": tensor}}
    <dir>/global_stepN/layer_{i:02d}-model_{RR:02d}-model_states.pt      {name: tensor}

DeepSpeed's own checkpoints of a pipeline module are in the second form, for any number of stages.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from neox_core.checkpoint.formats.model_weights import Locator, ModelWeights, NewRows, layouts_of
from neox_core.checkpoint.formats.outputs import OutputFile
from neox_core.checkpoint.formats.tensor_map import Form, iterate_layers, stored_tensors
from neox_core.config import ModelConfig, ParallelConfig
from neox_core.errors import CheckpointError
from neox_core.storage.folders import Folder, Location, check_exists, open_folder
from neox_core.storage.tensor_reader import StoredTensor, open_tensors

LATEST_FILE = "latest"
CONVERTED_TAG = "global_step0"
_LAYER_FILE = re.compile(r"layer_(\d+)-model_(\d+)-model_states\.pt")
_RANK_FILE = re.compile(r"mp_rank_(\d+)_model_states\.pt")


def layer_file(index: int, rank: int) -> str:
    """File of one layer and rank in the form with pipeline."""
    return f"layer_{index:02d}-model_{rank:02d}-model_states.pt"


def rank_file(rank: int) -> str:
    """File of one rank in the form without pipeline."""
    return f"mp_rank_{rank:02d}_model_states.pt"


def neox_files(
    weights: ModelWeights,
    model: ModelConfig,
    parallel: ParallelConfig,
    dtype: torch.dtype,
    new_rows: NewRows | None = None,
) -> list[OutputFile]:
    """The files of global_step0, in the form that `parallel.pipeline` asks for; all but `latest`.

    Args:
        model: what to write; its vocabulary may be larger than that of `weights`.
        new_rows: gives the rows that `weights` lack.
    """
    if parallel.pipeline == 1:
        return [_rank_file(weights, model, parallel.tensor, rank, dtype, new_rows) for rank in range(parallel.tensor)]
    return [
        OutputFile(
            f"{CONVERTED_TAG}/{layer_file(layer.index, rank)}",
            [
                weights.as_stored(layout, dtype, new_rows)
                for layout in stored_tensors(layer, model, Form.NEOX, parallel.tensor, rank)
            ],
        )
        for layer in iterate_layers(model)
        for rank in range(parallel.tensor)
    ]


def _rank_file(
    weights: ModelWeights, model: ModelConfig, ranks: int, rank: int, dtype: torch.dtype, new_rows: NewRows | None
) -> OutputFile:
    tensors = [
        weights.as_stored(layout, dtype, new_rows, prefix=f"sequential.{index}.")
        for index, layout in layouts_of(model, Form.NEOX, ranks, rank)
    ]
    return OutputFile(f"{CONVERTED_TAG}/{rank_file(rank)}", tensors, under="module")


def is_neox_file(path: str) -> bool:
    """Whether a path is one of the files that a conversion writes, for any layout."""
    folder, _, name = path.rpartition("/")
    return folder == CONVERTED_TAG and bool(_LAYER_FILE.fullmatch(name) or _RANK_FILE.fullmatch(name))


class NeoxCheckpoint:
    """A converted or a training checkpoint, read layer by layer; tensors stay on disk until they are used.

    `folder` has a `latest`, or is a global_stepN folder itself. Other files in it (optimizer states, random number
    generators) are not opened.

    Raises:
        CheckpointError: there is no checkpoint in the folder, or a rank's file is missing.
    """

    def __init__(self, location: Location) -> None:
        self.folder = _step_folder(open_folder(location))
        names = self.folder.names()
        self.files = tuple(name for name in names if _LAYER_FILE.fullmatch(name) or _RANK_FILE.fullmatch(name))
        """Names of the files that hold its weights."""
        by_layer = [match for name in names if (match := _LAYER_FILE.fullmatch(name))]
        by_rank = [match for name in names if (match := _RANK_FILE.fullmatch(name))]
        if not by_layer and not by_rank:
            raise CheckpointError(f"{self.folder} holds neither {layer_file(0, 0)} nor {rank_file(0)}")
        self._by_layer = bool(by_layer)
        ranks = {int(match[2]) for match in by_layer} or {int(match[1]) for match in by_rank}
        self.tensor_parallel = max(ranks) + 1
        """Number of ranks that share each layer."""
        self._rank_modules: dict[int, dict[str, Any]] = {}
        if missing := [rank_file(r) for r in range(self.tensor_parallel) if not by_layer and r not in ranks]:
            raise CheckpointError(f"{self.folder} lacks {', '.join(missing)} of {self.tensor_parallel} ranks")

    def layer(self, index: int, tensor_rank: int) -> dict[str, Tensor]:
        """A rank's tensors of the layer at NeoX's index, by NeoX's names; see `stored_layer`."""
        return {name: tensor.whole() for name, tensor in self.stored_layer(index, tensor_rank).items()}

    def layer_of(self, model: ModelConfig, ranks: int) -> Callable[[int, int], dict[str, Tensor]]:
        """`layer` for another number of tensor-parallel ranks, cut anew if it is not the files'; a layer at a time.

        Raises:
            CheckpointError: as `weights`; when called, also where a value is NaN or infinite.
        """
        if ranks == self.tensor_parallel:
            return self.layer
        weights, layers = self.weights(model), {layer.index: layer for layer in iterate_layers(model)}

        def cut(index: int, rank: int) -> dict[str, Tensor]:
            found = {}
            for layout in stored_tensors(layers[index], model, Form.NEOX, ranks, rank):
                made = torch.empty(layout.shape, dtype=weights.dtype)
                weights.as_stored(layout, weights.dtype).fill(made.view(-1, layout.shape[-1]), 0)
                found[layout.name] = made
            return found

        return cut

    def stored_layer(self, index: int, tensor_rank: int) -> dict[str, StoredTensor]:
        """A rank's tensors of the layer at NeoX's index, by NeoX's names, not read yet.

        Raises:
            CheckpointError: the file is missing or damaged, or has no such layer.
        """
        if not 0 <= tensor_rank < self.tensor_parallel:
            raise CheckpointError(f"{self.folder} has {self.tensor_parallel} tensor-parallel ranks, no {tensor_rank}")
        if self._by_layer:
            tensors = self._open(layer_file(index, tensor_rank))
        else:
            prefix = f"sequential.{index}."
            module = self._rank_module(tensor_rank)
            tensors = {name.removeprefix(prefix): value for name, value in module.items() if name.startswith(prefix)}
        if not tensors:
            raise CheckpointError(f"{self.folder} has no layer {index} for tensor-parallel rank {tensor_rank}")
        return {name: value for name, value in tensors.items() if isinstance(value, StoredTensor)}

    def weights(self, model: ModelConfig) -> ModelWeights:
        """The whole model, merged over the ranks.

        Raises:
            CheckpointError: a file is missing or damaged, or its tensors are not those that the model needs.
        """
        locator = Locator(str(self.folder), model, Form.NEOX, self.tensor_parallel)
        for rank in range(self.tensor_parallel):
            locator.add(rank, self._finder(rank))
        return locator.weights()

    def _finder(self, rank: int) -> Callable[[int, str], object]:
        """Finds a rank's tensors by layer and name; each file is opened once."""
        if not self._by_layer:
            module = self._rank_module(rank)
            return lambda index, name: module.get(f"sequential.{index}.{name}")

        @lru_cache(maxsize=1)
        def opened(index: int) -> dict[str, Any]:
            return self._open(layer_file(index, rank))

        return lambda index, name: opened(index).get(name)

    def _rank_module(self, rank: int) -> dict[str, Any]:
        if rank not in self._rank_modules:
            module = self._open(rank_file(rank)).get("module")
            if not isinstance(module, dict) or not module:
                raise CheckpointError(f"{self.folder}/{rank_file(rank)} holds no weights under 'module'")
            self._rank_modules[rank] = module
        return self._rank_modules[rank]

    def _open(self, name: str) -> dict[str, Any]:
        return open_tensors(self.folder.content(name))


def _step_folder(folder: Folder) -> Folder:
    """The folder itself if it is a step's, else the one that `latest` names."""
    check_exists(folder)
    names = folder.names()
    if LATEST_FILE not in names:
        if any(_LAYER_FILE.fullmatch(name) or _RANK_FILE.fullmatch(name) for name in names):
            return folder
        raise CheckpointError(f"{folder} holds neither {LATEST_FILE} nor files of a checkpoint")
    tag = folder.read_text(LATEST_FILE).strip()
    step = folder.sub(tag)
    if not step.exists():
        raise CheckpointError(f"{folder}/{LATEST_FILE} names {tag}, but {step} does not exist")
    return step
