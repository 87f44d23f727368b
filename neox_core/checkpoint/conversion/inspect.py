"""What a folder of weights holds: layout, architecture, and where each tensor lives."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

from neox_core.artifact import ARTIFACT_FILE, parse_artifact
from neox_core.checkpoint.conversion.convert import open_source
from neox_core.checkpoint.formats.description import described_by
from neox_core.checkpoint.formats.model_files import CONFIG_FILE, PARAMS_FILE
from neox_core.checkpoint.formats.model_weights import ModelWeights
from neox_core.checkpoint.formats.neox import NeoxCheckpoint
from neox_core.config import ModelConfig
from neox_core.errors import CheckpointError
from neox_core.storage.folders import Folder, Location, check_exists, open_folder


@dataclass(frozen=True)
class Entry:
    """One tensor of one file."""

    file: str
    name: str
    shape: tuple[int, ...]
    dtype: str
    whole: str
    """The model's tensors that it holds or has a part of, by Hugging Face's names."""


@dataclass(frozen=True)
class Description:
    """A folder of weights."""

    form: str
    model: ModelConfig
    parameters: int
    """Of the whole model: copies in several files count once."""
    entries: tuple[Entry, ...]


def inspect(location: Location, model: ModelConfig | None = None) -> Description:
    """Describe a folder in Meta's, Hugging Face's or NeoX's layout. Only indices of files are read.

    Args:
        model: NeoX only: the architecture, where the folder has no artifact.json that says it.

    Raises:
        CheckpointError: the folder is none of these, or is damaged or inconsistent.
    """
    folder = open_folder(location)
    check_exists(folder)
    if {PARAMS_FILE, CONFIG_FILE} & set(folder.names()):
        source = open_source(folder)
        return _described("Meta" if source.files.is_meta else "Hugging Face", source.weights)
    checkpoint = NeoxCheckpoint(folder)
    weights = checkpoint.weights(model or recorded_model(folder))
    return _described(f"NeoX, {checkpoint.tensor_parallel} tensor-parallel ranks", weights)


def recorded_model(folder: Folder) -> ModelConfig:
    """The architecture that a converted folder's artifact.json records.

    Raises:
        CheckpointError: there is none.
    """
    check_exists(folder)
    try:
        text = folder.read_text(ARTIFACT_FILE)
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder} has no {ARTIFACT_FILE} with the model's architecture: give the run's YAML file with --config"
        ) from None
    with described_by(f"{folder}/{ARTIFACT_FILE}"):
        return ModelConfig.model_validate(parse_artifact(text, Path(str(folder))).config["model"])


def _described(form: str, weights: ModelWeights) -> Description:
    parameters = sum(prod(weights.shape(name)) for name in weights.places)
    return Description(form, weights.model, parameters, tuple(_entries(weights)))


def _entries(weights: ModelWeights) -> Iterator[Entry]:
    """Each file's tensors, with the whole tensors that they belong to."""
    belongs: dict[tuple[str, int, str], Entry] = {}
    for whole, places in weights.places.items():
        for place in places:
            stored = place.stored
            key = (stored.content.name, stored.offset, stored.name)
            known = belongs.get(key)
            names = [*(known.whole.split(", ") if known else ()), whole]
            belongs[key] = Entry(
                Path(stored.content.name).name,
                stored.name,
                stored.shape,
                str(stored.dtype).removeprefix("torch."),
                ", ".join(dict.fromkeys(names)),
            )
    yield from (belongs[key] for key in sorted(belongs))
