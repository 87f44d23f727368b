"""NeoX checkpoints: the form without pipeline (one file per rank), and with (one file per layer and rank).

    <dir>/latest                                                "global_stepN"
    <dir>/global_stepN/mp_rank_RR_model_states.pt               {"module": {"sequential.{i}.{name}": tensor}}
    <dir>/global_stepN/layer_{i:02d}-model_{RR:02d}-model_states.pt      {name: tensor}

DeepSpeed's own checkpoints of a pipeline module are in the second form, for any number of stages.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from neox_core.artifact import write_atomically
from neox_core.checkpoint.files import load_file, save_file
from neox_core.checkpoint.layout import KINDS, Layer, iterate_layers, join
from neox_core.config import ParallelConfig
from neox_core.errors import CheckpointError
from neox_core.progress import Progress, silent

LATEST_FILE = "latest"
CONVERTED_TAG = "global_step0"
_LAYER_FILE = re.compile(r"layer_(\d+)-model_(\d+)-model_states\.pt")
_RANK_FILE = re.compile(r"mp_rank_(\d+)_model_states\.pt")

RankLayer = Callable[[Layer, int], dict[str, Tensor]]
"""Gives a layer's tensors of one tensor-parallel rank, by NeoX's names."""


def layer_file(index: int, rank: int) -> str:
    """File of one layer and rank in the form with pipeline."""
    return f"layer_{index:02d}-model_{rank:02d}-model_states.pt"


def rank_file(rank: int) -> str:
    """File of one rank in the form without pipeline."""
    return f"mp_rank_{rank:02d}_model_states.pt"


def write_neox(
    target: Path, num_layers: int, parallel: ParallelConfig, read: RankLayer, progress: Progress = silent
) -> None:
    """Write `target`/global_step0 and, last, `target`/latest, in the form that `parallel.pipeline` asks for.

    Files of an earlier attempt are removed first. Memory: one layer with pipeline; one rank's weights without.
    """
    folder = target / CONVERTED_TAG
    (target / LATEST_FILE).unlink(missing_ok=True)
    for path in folder.iterdir() if folder.is_dir() else ():
        if _LAYER_FILE.fullmatch(path.name) or _RANK_FILE.fullmatch(path.name):
            path.unlink()
    write = _write_layer_files if parallel.pipeline > 1 else _write_rank_files
    write(folder, list(iterate_layers(num_layers)), parallel.tensor, read, progress)
    write_atomically(target / LATEST_FILE, CONVERTED_TAG)


def _write_layer_files(folder: Path, layers: list[Layer], ranks: int, read: RankLayer, progress: Progress) -> None:
    for done, layer in enumerate(layers, start=1):
        for rank in range(ranks):
            save_file(folder / layer_file(layer.index, rank), read(layer, rank))
        progress(done / len(layers), f"{done} of {len(layers)} layers for {ranks} tensor-parallel ranks")


def _write_rank_files(folder: Path, layers: list[Layer], ranks: int, read: RankLayer, progress: Progress) -> None:
    for rank in range(ranks):
        module: dict[str, Tensor] = {}
        for done, layer in enumerate(layers, start=1):
            module |= {f"sequential.{layer.index}.{name}": tensor for name, tensor in read(layer, rank).items()}
            share = (rank + done / len(layers)) / ranks
            progress(min(share, 0.999), f"rank {rank + 1} of {ranks}: {done} of {len(layers)} layers")
        save_file(folder / rank_file(rank), {"module": module})
    progress(1.0, f"{ranks} tensor-parallel ranks written")


class NeoxCheckpoint:
    """A converted or a training checkpoint, read layer by layer; tensors stay on disk until they are used.

    `folder` has a `latest`, or is a global_stepN folder itself. Other files in it (optimizer states, random number
    generators) are not opened.

    Raises:
        CheckpointError: there is no checkpoint in the folder, or a rank's file is missing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = _step_folder(folder)
        names = [path.name for path in self.folder.iterdir()]
        by_layer = [match for name in names if (match := _LAYER_FILE.fullmatch(name))]
        by_rank = [match for name in names if (match := _RANK_FILE.fullmatch(name))]
        if not by_layer and not by_rank:
            raise CheckpointError(f"{self.folder} holds neither {layer_file(0, 0)} nor {rank_file(0)}")
        self._by_layer = bool(by_layer)
        ranks = {int(match[2]) for match in by_layer} or {int(match[1]) for match in by_rank}
        self.tensor_parallel = max(ranks) + 1
        """Number of ranks that share each layer."""
        self._rank_modules: dict[int, dict[str, Tensor]] = {}
        if missing := [rank_file(r) for r in range(self.tensor_parallel) if not by_layer and r not in ranks]:
            raise CheckpointError(f"{self.folder} lacks {', '.join(missing)} of {self.tensor_parallel} ranks")

    def layer(self, index: int, tensor_rank: int) -> dict[str, Tensor]:
        """A rank's tensors of the layer at NeoX's index, by NeoX's names.

        Raises:
            CheckpointError: the file is missing or damaged, or has no such layer.
        """
        if not 0 <= tensor_rank < self.tensor_parallel:
            raise CheckpointError(f"{self.folder} has {self.tensor_parallel} tensor-parallel ranks, no {tensor_rank}")
        if self._by_layer:
            tensors = load_file(self.folder / layer_file(index, tensor_rank))
        else:
            prefix = f"sequential.{index}."
            module = self._rank_module(tensor_rank)
            tensors = {name.removeprefix(prefix): value for name, value in module.items() if name.startswith(prefix)}
        if not tensors:
            raise CheckpointError(f"{self.folder} has no layer {index} for tensor-parallel rank {tensor_rank}")
        return tensors

    def full_layer(self, index: int) -> dict[str, Tensor]:
        """The layer's whole tensors, merged over the ranks: what a checkpoint of one rank holds.

        Raises:
            CheckpointError: a file is missing or damaged, names are wrong, or ranks disagree on a replicated tensor.
        """
        ranks = [self.layer(index, rank) for rank in range(self.tensor_parallel)]
        kinds = [{tensor.neox for tensor in kind} for kind in KINDS]
        for rank, tensors in enumerate(ranks):
            if set(tensors) not in kinds or set(tensors) != set(ranks[0]):
                raise CheckpointError(
                    f"{self.folder}: layer {index} of rank {rank} holds {sorted(tensors)}, not a Llama layer's tensors"
                )
        return join(ranks, f"{self.folder}, layer {index}")

    def _rank_module(self, rank: int) -> dict[str, Tensor]:
        if rank not in self._rank_modules:
            path = self.folder / rank_file(rank)
            module: Any = load_file(path).get("module")
            if not isinstance(module, dict) or not module:
                raise CheckpointError(f"{path} holds no weights under 'module'")
            self._rank_modules[rank] = module
        return self._rank_modules[rank]


def _step_folder(folder: Path) -> Path:
    """The folder itself if it is a step's, else the one that `latest` names."""
    if not folder.is_dir():
        raise CheckpointError(f"checkpoint folder {folder} does not exist")
    latest = folder / LATEST_FILE
    if not latest.is_file():
        if any(_LAYER_FILE.fullmatch(path.name) or _RANK_FILE.fullmatch(path.name) for path in folder.iterdir()):
            return folder
        raise CheckpointError(f"{folder} holds neither {LATEST_FILE} nor files of a checkpoint")
    step = folder / latest.read_text(encoding="utf-8").strip()
    if not step.is_dir():
        raise CheckpointError(f"{latest} names {step.name}, but {step} does not exist")
    return step
