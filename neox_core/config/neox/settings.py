"""GPT-NeoX's YAML files, read, merged and checked: what is left is only to be renamed."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from neox_core.config.neox.keys import KNOWN_KEYS
from neox_core.config.yaml_file import read_yaml
from neox_core.errors import ConfigError

_DEFAULTS: Mapping[str, Any] = {
    "rotary_emb_base": 10000,
    "rms_norm_epsilon": 1e-8,
    "weight_decay": 0.01,
    "gradient_clipping": 1.0,
    "warmup": 0.01,
    "min_lr": 0.0,
    "gradient_accumulation_steps": 1,
    "eval_interval": 1000,
    "eval_iters": 100,
    "log_interval": 100,
    "checkpoint_activations": False,
    "model_parallel_size": 1,
    "make_vocab_size_divisible_by": 128,
    "seed": 1234,
}
"""GPT-NeoX's own defaults of the keys that have a counterpart here, when it still had `mlp_type`."""
_DEFAULTS_TODAY: Mapping[str, Any] = {"weight_decay": 0.1}
"""Those that are others since."""


@dataclass
class NeoxSettings:
    """The merged settings by key (with underscores), and notes on what the user must see."""

    values: Mapping[str, Any]
    todo: list[tuple[str, str]] = field(default_factory=list)

    @property
    def today(self) -> bool:
        """Whether the files are of a GPT-NeoX in which `activation` alone selects the MLP; before, `mlp_type` did."""
        return self.get("mlp_type") is None

    def get(self, *keys: str) -> Any:
        """The value of the one of several synonymous keys that is set; None if none is.

        Raises:
            ConfigError: two of them are set to different values.
        """
        given = {key: self.values[key] for key in keys if self.values.get(key) is not None}
        if len({repr(value) for value in given.values()}) > 1:
            raise ConfigError(f"GPT-NeoX keys that mean the same disagree: {_listing(given)}: keep one")
        return next(iter(given.values()), None)

    def need(self, *keys: str) -> Any:
        """Like `get`, but the value must be there."""
        value = self.get(*keys)
        if value is None:
            raise ConfigError(f"GPT-NeoX key {keys[0]!r} is not in the files: add the file that sets it")
        return value

    def default(self, key: str, ours: str, *synonyms: str) -> Any:
        """The value, or GPT-NeoX's default, of which the user is told under our key `ours`."""
        value = self.get(key, *synonyms)
        if value is not None:
            return value
        defaults = {**_DEFAULTS, **(_DEFAULTS_TODAY if self.today else {})}
        self.todo.append((ours, f"check {defaults[key]!r}: {key} is not in the files, so this is GPT-NeoX's default"))
        return defaults[key]

    def number(self, *keys: str) -> float | None:
        """Like `get`, for a number; YAML reads 1e-5 as text."""
        value = self.get(*keys)
        return None if value is None else as_number(keys[0], value)

    def whole(self, *keys: str, least: int = 1) -> int | None:
        """Like `get`, for a whole number from `least` on."""
        value = self.number(*keys)
        if value is None:
            return None
        if not value.is_integer() or value < least:
            raise ConfigError(f"GPT-NeoX key {keys[0]!r} is {value!r}, which is not a whole number from {least} on")
        return int(value)

    def need_whole(self, *keys: str) -> int:
        """Like `whole`, but the value must be there."""
        self.need(*keys)
        value = self.whole(*keys)
        assert value is not None
        return value

    def mapping(self, key: str) -> dict[str, Any]:
        """A nested mapping's value; empty if it is not set."""
        value = self.get(key)
        if value is not None and not isinstance(value, dict):
            raise ConfigError(f"GPT-NeoX key {key!r} is {value!r}, which is not a mapping")
        return dict(value or {})


def as_number(key: str, value: Any) -> float:
    """The value as a number; `key` names it in the error."""
    try:
        if isinstance(value, bool):
            raise TypeError
        if math.isfinite(number := float(value)):
            return number
        raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise ConfigError(f"GPT-NeoX key {key!r} is {value!r}, which is not a number") from None


def read_settings(paths: Sequence[Path]) -> NeoxSettings:
    """Read and merge the files; `-` and `_` are the same in keys, as GPT-NeoX has it.

    Raises:
        ConfigError: a file cannot be read, a key is unknown, two files give a key different values, or a value is of
            another kind than the key's (a path where a list of them belongs).
    """
    if not paths:
        raise ConfigError("no GPT-NeoX file given: name at least one")
    values: dict[str, Any] = {}
    origin: dict[str, Path] = {}
    for path in paths:
        spelt: dict[str, str] = {}
        for written, value in read_yaml(path).items():
            key = str(written).replace("-", "_")
            if key in spelt:
                raise ConfigError(
                    f"config file {path}: {written!r} and {spelt[key]!r} are the same GPT-NeoX key: keep one"
                )
            if key in values and values[key] != value:
                raise ConfigError(
                    f"GPT-NeoX key {written!r} is {values[key]!r} in {origin[key]} and {value!r} in {path}: keep one"
                )
            require_known(key, KNOWN_KEYS, str(path))
            spelt[key], origin[key], values[key] = str(written), path, value
    _require_kinds(values)
    return NeoxSettings(values)


_TEXT = ("data_path", "vocab_file", "s3_path", "launcher", "attention_type", "wandb_project", "wandb_team")
_PATHS = ("train_data_paths", "valid_data_paths", "test_data_paths")


def _require_kinds(values: Mapping[str, Any]) -> None:
    """Text where text belongs, lists where lists do: a path in place of a list would be read letter by letter."""
    for key, value in values.items():
        if value is None:
            continue
        if key in _TEXT and not (isinstance(value, str) and value):
            raise ConfigError(f"GPT-NeoX key {key!r} is {value!r}, which is not text")
        if key in _PATHS and not (isinstance(value, list) and value and all(isinstance(path, str) for path in value)):
            raise ConfigError(f"GPT-NeoX key {key!r} is {value!r}, which is not a list of paths")
        if key == "train_data_weights" and not (isinstance(value, list) and value):
            raise ConfigError(f"GPT-NeoX key {key!r} is {value!r}, which is not a list of numbers")
        if key == "checkpoint_activations" and not isinstance(value, bool):
            raise ConfigError(f"GPT-NeoX key {key!r} is {value!r}: give true or false")


def require_known(key: str, known: Iterable[str], where: str) -> None:
    """Raise ConfigError, with the nearest known key, if a key is none of them."""
    known = sorted(known)
    if key in known:
        return
    nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    hint = f"did you mean {nearest[0]!r}?" if nearest else "it is not among the keys that can be imported: remove it"
    raise ConfigError(f"{where}: unknown GPT-NeoX key {key!r}: {hint}")


def _listing(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value!r}" for key, value in values.items())
