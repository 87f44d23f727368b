"""The files that make up a model in a folder: one list, which conversion, proof and fingerprint share.

A folder holds more than the model: a browser's copy of a shard, `._` files of another system, a backup next to it. What
counts is numbered shards (Meta), or what the index names (Hugging Face); everything else is left alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from neox_core.errors import CheckpointError
from neox_core.storage.folders import Folder, check_exists
from neox_core.storage.stand_ins import stand_in

PARAMS_FILE = "params.json"
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
ADAPTER_FILE = "adapter_config.json"
_SHARD = re.compile(r"consolidated\.(\d{2,})\.pth")


@dataclass(frozen=True)
class ModelFiles:
    """Names of a model's files in its folder."""

    description: str
    """params.json or config.json."""
    weights: tuple[str, ...]
    """In order."""
    index: Mapping[str, str] = field(default_factory=dict)
    """Hugging Face with several files: the file of each tensor."""

    @property
    def is_meta(self) -> bool:
        """Meta's format; else Hugging Face's."""
        return self.description == PARAMS_FILE

    @property
    def names(self) -> tuple[str, ...]:
        """All of them."""
        return (self.description, *((INDEX_FILE,) if self.index else ()), *self.weights)


def shard_name(shard: int) -> str:
    """File name of a shard in Meta's format."""
    return f"consolidated.{shard:02d}.pth"


def model_files(folder: Folder) -> ModelFiles:
    """The files of the model in Meta's format (where there are such shards) or Hugging Face's.

    Raises:
        CheckpointError: the folder does not exist or holds neither, or shards are missing.
    """
    check_exists(folder)
    names = set(folder.names())
    if PARAMS_FILE in names and (_shards(names) or CONFIG_FILE not in names):
        return meta_files_of(folder)
    if CONFIG_FILE in names:
        return huggingface_files_of(folder)
    raise CheckpointError(
        f"{folder} holds no {PARAMS_FILE} and no {CONFIG_FILE}: is it a model in Meta's or Hugging Face's format?"
    )


def meta_files_of(folder: Folder) -> ModelFiles:
    """The files of a model in Meta's format.

    Raises:
        CheckpointError: there are no shards, or their numbers have a gap.
    """
    check_exists(folder)
    names = set(folder.names())
    if PARAMS_FILE not in names:
        raise CheckpointError(f"{folder} holds no {PARAMS_FILE}: is it a checkpoint in Meta's format?")
    if not (numbers := _shards(names)):
        raise CheckpointError(f"{folder} holds no {shard_name(0)}: copy Meta's weights there")
    shards = [shard_name(number) for number in range(max(numbers) + 1)]
    if missing := [name for number, name in enumerate(shards) if number not in numbers]:
        raise CheckpointError(f"{folder} lacks {some(missing)} of {len(shards)} shards: copy all of them")
    return ModelFiles(PARAMS_FILE, tuple(shards))


def huggingface_files_of(folder: Folder) -> ModelFiles:
    """The files of a model in Hugging Face's format.

    Raises:
        CheckpointError: there are no weights, one that the index names is missing, there are two models, or an adapter
            that changes the model.
    """
    names = set(folder.names())
    if ADAPTER_FILE in names:
        raise CheckpointError(
            f"{folder} holds {ADAPTER_FILE}, an adapter (LoRA) that changes what the weights next to it compute: "
            "merge it into them (merge_and_unload of the package peft), or move it away to go without it"
        )
    if INDEX_FILE not in names:
        if WEIGHTS_FILE not in names:
            if others := sorted(name for name in names if name.lower().endswith(".safetensors") and name[0] != "."):
                raise CheckpointError(
                    f"{folder} holds {some(others)}, but neither {WEIGHTS_FILE} nor {INDEX_FILE}, which names the "
                    "files of a model: copy the index too, or give the file its name"
                )
            raise CheckpointError(
                f"{folder} holds neither {WEIGHTS_FILE} nor {INDEX_FILE}: weights in other formats (.bin) are not "
                "read, because they are pickles; save them as safetensors"
            )
        return ModelFiles(CONFIG_FILE, (WEIGHTS_FILE,))
    index = read_json(folder, INDEX_FILE).get("weight_map")
    if not isinstance(index, dict) or not index or not all(isinstance(name, str) for name in index.values()):
        raise CheckpointError(f"{folder}/{INDEX_FILE} has no weight_map from tensors to files")
    weights = sorted(set(index.values()))
    if missing := [name for name in weights if name not in names]:
        raise CheckpointError(f"{folder} lacks {some(missing)} of {len(weights)} files that {INDEX_FILE} names")
    if WEIGHTS_FILE in names - set(weights):
        raise CheckpointError(
            f"{folder} holds {WEIGHTS_FILE}, and {INDEX_FILE} of other files: are these two models? Move one away"
        )
    return ModelFiles(CONFIG_FILE, tuple(weights), index)


def read_json(folder: Folder, name: str) -> dict[str, Any]:
    """A JSON object.

    Raises:
        CheckpointError: the file is missing or holds something else.
    """
    path = f"{folder}/{name}"
    try:
        text = folder.read_text(name)
        if instead := stand_in(text[:200].encode()):
            raise CheckpointError(f"{path} is {instead}")
        content = json.loads(text)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from None
    except RecursionError:
        raise CheckpointError(f"{path} cannot be read as JSON: it is nested too deeply") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not {type(content).__name__}")
    return content


def some(names: list[str]) -> str:
    """The first names of a list."""
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def _shards(names: set[str]) -> set[int]:
    """Numbers of the shards; consolidated.1.pth or a copy's name is none."""
    found = {int(match[1]) for name in names if (match := _SHARD.fullmatch(name))}
    return {number for number in found if shard_name(number) in names}
