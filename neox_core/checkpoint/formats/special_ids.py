"""Begin, end and padding ids and the settings of generation: those of the base model, which no conversion invents."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from neox_core.checkpoint.formats.description import shown
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
    config: Mapping[str, Any] | None = None
    """The base's config.json, with which an export's is compared; None: it is not known."""

    def generation_config(self) -> dict[str, Any]:
        """The content of generation_config.json."""
        return dict(self.ids if self.generation is None else self.generation)

    def as_json(self) -> dict[str, Any]:
        """For a summary; `from_json` reads it."""
        said = {"ids": dict(self.ids), "generation": None if self.generation is None else dict(self.generation)}
        return said if self.config is None else said | {"config": dict(self.config)}


def from_json(content: Mapping[str, Any]) -> SpecialIds:
    """What `as_json` wrote."""
    return SpecialIds(dict(content.get("ids") or {}), content.get("generation"), content.get("config"))


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
    return SpecialIds(ids, generation, config)


def config_differences(base: Mapping[str, Any], exported: Mapping[str, Any]) -> str:
    """In which keys an export's config.json is not its base's, with both values; empty: in none."""

    def said(content: Mapping[str, Any], key: str) -> str:
        return shown(content[key]) if key in content else "absent"

    alike = {key for key in base.keys() & exported.keys() if base[key] == exported[key]}
    changed = sorted((base.keys() | exported.keys()) - alike)
    return ", ".join(f"{key} {said(exported, key)} (base: {said(base, key)})" for key in changed)
