"""GPT-NeoX's YAML files, read, merged and checked: what is left is only to be renamed."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from neox_core.config.load import read_yaml
from neox_core.config.neox.keys import (
    DATA_TYPES,
    FIXED,
    INEFFECTIVE,
    KNOWN_KEYS,
    OFF,
    ZERO_FIXED,
    ZERO_INEFFECTIVE,
    Fixed,
)
from neox_core.errors import ConfigError

Ineffective = tuple[str, Any, str]
"""Key, value, and why it changes nothing here."""

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
"""GPT-NeoX's own defaults of the keys that have a counterpart here."""


@dataclass
class NeoxSettings:
    """The merged settings by key (with underscores), and notes on what the user must see."""

    values: Mapping[str, Any]
    todo: list[tuple[str, str]] = field(default_factory=list)

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
        self.todo.append((ours, f"check {_DEFAULTS[key]!r}: {key} is not in the files, so this is GPT-NeoX's default"))
        return _DEFAULTS[key]

    def number(self, *keys: str) -> float | None:
        """Like `get`, for a number; YAML reads 1e-5 as text."""
        value = self.get(*keys)
        return None if value is None else as_number(keys[0], value)

    def whole(self, *keys: str) -> int | None:
        """Like `get`, for a whole number."""
        value = self.number(*keys)
        if value is not None and not value.is_integer():
            raise ConfigError(f"GPT-NeoX key {keys[0]!r} is {value!r}, which is not a whole number")
        return None if value is None else int(value)

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
        return float(value)
    except (TypeError, ValueError):
        raise ConfigError(f"GPT-NeoX key {key!r} is {value!r}, which is not a number") from None


def read_settings(paths: Sequence[Path]) -> NeoxSettings:
    """Read and merge the files; `-` and `_` are the same in keys, as GPT-NeoX has it.

    Raises:
        ConfigError: a file cannot be read, a key is unknown, or two files give a key different values.
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
            _require_known(key, KNOWN_KEYS, str(path))
            spelt[key], origin[key], values[key] = str(written), path, value
    return NeoxSettings(values)


def ineffective_keys(settings: NeoxSettings) -> list[Ineffective]:
    """The keys that are set and change nothing, with the reason.

    Raises:
        ConfigError: a key's value, or GPT-NeoX's default for it, asks for something that is not done here.
    """
    found: list[Ineffective] = []
    for key, value in settings.values.items():
        if value is None:
            found.append((key, None, "null is as if it were not set"))
        elif key in OFF:
            _require_off(key, value)
            found.append((key, value, f"it is off here too: {OFF[key]}"))
        elif key in INEFFECTIVE:
            found.append((key, value, INEFFECTIVE[key]))
    found += _fixed(settings.values, FIXED)
    _require_dense_attention(settings)
    found += _zero_optimization(settings.mapping("zero_optimization"))
    found += _data_types(settings.mapping("data_types"))
    return found


def _fixed(values: Mapping[str, Any], table: Mapping[str, Fixed], prefix: str = "") -> Iterator[Ineffective]:
    """The keys of `table` that are set, once the values of all of them, or GPT-NeoX's defaults, are found accepted."""
    for key, rule in table.items():
        value = values.get(key)
        effective = rule.default if value is None else value
        if effective is not None and not any(_same(effective, accepted) for accepted in rule.accepted):
            source = " (GPT-NeoX's default, as the files don't set it)" if value is None else ""
            raise ConfigError(
                f"GPT-NeoX key {prefix + key!r} is {effective!r}{source}, which is not supported: {rule.reason}; "
                f"accepted: {', '.join(map(repr, rule.accepted))}"
            )
        if value is not None:
            yield prefix + key, value, f"always so: {rule.reason}"


def _same(value: Any, accepted: Any) -> bool:
    """Equality that keeps True and 1 apart, but not 0 and 0.0."""
    return bool(value == accepted) and isinstance(value, bool) == isinstance(accepted, bool)


def _require_off(key: str, value: Any) -> None:
    if value and not (isinstance(value, dict) and value.get("enabled") is False):
        raise ConfigError(f"GPT-NeoX key {key!r} is {value!r}, which is not supported: {OFF[key]}; remove it")


def _require_dense_attention(settings: NeoxSettings) -> None:
    """attention_config: [[[kinds], repeats], ...]."""
    config = settings.get("attention_config")
    kinds = {kind for block in config or [] for kind in (block[0] if isinstance(block, list) else [block])}
    if other := sorted(map(str, kinds - {"global", "flash"})):
        raise ConfigError(
            f"GPT-NeoX key 'attention_config' names {other}, which is not supported: attention is dense and causal, "
            "which GPT-NeoX calls 'global' or 'flash'"
        )


def _zero_optimization(options: Mapping[str, Any]) -> Iterator[Ineffective]:
    for key, value in options.items():
        _require_known(key, ZERO_FIXED.keys() | ZERO_INEFFECTIVE, "zero_optimization")
        if key in ZERO_INEFFECTIVE:
            yield f"zero_optimization.{key}", value, "it changes speed and memory, not numbers"
    yield from _fixed(options, ZERO_FIXED, "zero_optimization.")


def _data_types(options: Mapping[str, Any]) -> Iterator[Ineffective]:
    for key in options:
        _require_known(key, DATA_TYPES.keys(), "data_types")
    yield from _fixed(options, DATA_TYPES, "data_types.")


def _require_known(key: str, known: Iterable[str], where: str) -> None:
    known = sorted(known)
    if key in known:
        return
    nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    hint = f"did you mean {nearest[0]!r}?" if nearest else "it is not among the keys that can be imported: remove it"
    raise ConfigError(f"{where}: unknown GPT-NeoX key {key!r}: {hint}")


def _listing(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value!r}" for key, value in values.items())
