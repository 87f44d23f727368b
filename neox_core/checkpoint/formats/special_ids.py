"""Begin, end and padding ids and the settings of generation: those of the base model, which no conversion invents."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from neox_core.checkpoint.formats.model_files import CONFIG_FILE, model_files, read_json
from neox_core.errors import CheckpointError
from neox_core.storage.folders import Folder

GENERATION_FILE = "generation_config.json"
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class SpecialIds:
    """What a Hugging Face folder says besides the architecture."""

    ids: Mapping[str, Any] = field(default_factory=dict)
    """bos_token_id, eos_token_id and pad_token_id, as far as they are known: an id, or a list of several ends."""
    generation: Mapping[str, Any] | None = None
    """generation_config.json; None: there is none, and it follows from the ids."""

    def generation_config(self) -> dict[str, Any]:
        """The content of generation_config.json."""
        return dict(self.ids if self.generation is None else self.generation)

    def as_json(self) -> dict[str, Any]:
        """For a summary; `from_json` reads it."""
        return {"ids": dict(self.ids), "generation": None if self.generation is None else dict(self.generation)}


def from_json(content: Mapping[str, Any]) -> SpecialIds:
    """What `as_json` wrote."""
    return SpecialIds(dict(content.get("ids") or {}), content.get("generation"))


def special_ids_of(folder: Folder) -> SpecialIds:
    """A folder's in Hugging Face's format; empty for Meta's, where only the tokenizer has them.

    Raises:
        CheckpointError: the folder is in neither format, or config.json cannot be read.
    """
    if model_files(folder).is_meta:
        return SpecialIds()
    config = read_json(folder, CONFIG_FILE)
    ids = {key: config[key] for key in _IDS if config.get(key) is not None}
    for key, value in ids.items():
        several = value if isinstance(value, list) else [value]
        if not several or not all(type(one) is int for one in several):
            raise CheckpointError(f"{folder}/{CONFIG_FILE}: {key} is {value!r}: give an id, or a list of ids")
    generation = read_json(folder, GENERATION_FILE) if GENERATION_FILE in folder.names() else None
    return SpecialIds(ids, generation)
