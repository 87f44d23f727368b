"""The base weights' files: which they are, what tells their content, and a toy's, which are made here."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import TYPE_CHECKING

from neox_core.config import RunConfig
from neox_core.errors import CheckpointError, ConfigError
from tasks.identity.stage import digest_cache

if TYPE_CHECKING:
    from neox_core.storage.folders import Location

_META, _HUGGINGFACE = "params.json", "config.json"
_MAKING = ".random-weights"
"""Lies in a toy's folder while weights are made there, and after a kill says that they were."""
_WEIGHTS = (".pth", ".pt", ".bin", ".safetensors", ".gguf")
"""How names of files with weights end."""


def make_toy_base(config: RunConfig) -> bool:
    """Make the random weights that `base_model.random_seed` describes, unless `base_model.path` holds weights.

    What a killed process had made of them is made anew; nothing else is replaced.

    Returns:
        Whether they were made; never without a seed.

    Raises:
        ConfigError: as `_check_to_be_made`.
    """
    base = config.base_model
    if base.random_seed is None or isinstance(base.path, str) or _described(base.path):
        return False
    _check_to_be_made(config, base.path)
    from neox_core.checkpoint.conversion.convert import base_architecture
    from neox_core.checkpoint.conversion.toy_base import make_random_base

    mark = base.path / _MAKING
    base.path.mkdir(parents=True, exist_ok=True)
    with mark.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # another process may be making them
        if missing := not _described(base.path):
            _remove_parts(base.path)
            model = base_architecture(config.model, base.rope_theta, base.vocab_size)
            make_random_base(model, base.path, base.random_seed)
        mark.unlink(missing_ok=True)
    return missing


def check_base(config: RunConfig) -> None:
    """Check that the base weights' files are there, or can be made.

    Raises:
        ConfigError, StorageError: as `base_digests` and `_check_to_be_made`.
    """
    base = config.base_model
    if isinstance(base.path, str):
        _remote_digests(base.path, config)
    elif _described(base.path) or base.random_seed is None:
        _files(base.path)
    else:
        _check_to_be_made(config, base.path)


def base_digests(config: RunConfig) -> dict[str, str]:
    """What tells the content of each file of the base weights: SHA-256, or an S3 object's ETag and size, hashed.

    Raises:
        ConfigError: `base_model.path` holds no weights.
        StorageError: the object store cannot be listed.
    """
    if isinstance(config.base_model.path, str):
        return _remote_digests(config.base_model.path, config)
    paths = _files(config.base_model.path)
    digests = digest_cache(config.workdir).digests(paths)
    return {path.name: digest for path, digest in zip(paths, digests, strict=True)}


def _check_to_be_made(config: RunConfig, folder: Path) -> None:
    """Check that a toy's weights can be made without harm to what is there.

    Raises:
        ConfigError: the folder holds weights that were not made here, or Meta's format cannot hold the model.
    """
    from neox_core.checkpoint.formats.meta_params import meta_problem
    from neox_core.checkpoint.formats.model_files import some

    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        names = []
    except OSError as error:
        raise ConfigError(f"base_model.path {folder} cannot be read: {error.strerror}: give a folder") from None
    weights = sorted(name for name in names if name.endswith(_WEIGHTS))
    if weights and _MAKING not in names:
        raise ConfigError(
            f"base_model.path {folder} holds {some(weights)}, but neither {_META} nor {_HUGGINGFACE}, and "
            "base_model.random_seed makes weights only where none are: to start from these, add the file that "
            "describes them; else give the path of another folder"
        )
    if problem := meta_problem(config.model):
        raise ConfigError(
            f"base_model.random_seed cannot make weights of this model: {problem}: change the model, or leave "
            "random_seed out and give weights in Hugging Face's format as base_model.path"
        )


def _remove_parts(folder: Path) -> None:
    """Remove what a killed process had made, perhaps of another model; no process may be making weights there now."""
    from neox_core.checkpoint.conversion.toy_base import MOST_SHARDS
    from neox_core.checkpoint.formats.model_files import shard_name
    from neox_core.storage.atomic import remove_remains

    for name in (*map(shard_name, range(MOST_SHARDS)), _META):
        (folder / name).unlink(missing_ok=True)
        remove_remains(folder / name)


def _described(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (_META, _HUGGINGFACE))


def _files(folder: Path) -> list[Path]:
    if not _described(folder):
        raise ConfigError(
            f"base_model.path {folder} holds no {_META}: give the folder of Meta's weights "
            f"({_META} and consolidated.NN.pth) or Hugging Face's ({_HUGGINGFACE} and safetensors)"
        )
    return [folder / name for name in sorted(_names(folder))]


def _names(folder: Location) -> tuple[str, ...]:
    """The files that the conversion reads, and no others that lie next to them."""
    from neox_core.checkpoint.formats.model_files import model_files
    from neox_core.storage.folders import open_folder

    try:
        return model_files(open_folder(folder)).names
    except CheckpointError as error:
        raise ConfigError(f"base_model.path: {error}") from None


def _remote_digests(url: str, config: RunConfig) -> dict[str, str]:
    from neox_core.storage.folders import file_versions, open_folder

    folder = open_folder(url, config.storage)
    return file_versions(folder, _names(folder))
