"""What GPT-NeoX's files ask for that is not done here: the first in full, the kind of model before all else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from neox_core.config.neox.keys import DATA_TYPES, FIXED, INEFFECTIVE, OFF, ZERO_FIXED, Fixed
from neox_core.config.neox.settings import NeoxSettings
from neox_core.errors import ConfigError

Refusal = tuple[str, str]
"""Key, and what it asks for."""


def require_supported(settings: NeoxSettings) -> None:
    """Refuse what the files ask for, and then what GPT-NeoX's defaults ask for where the files leave a key out.

    Raises:
        ConfigError: a key, or GPT-NeoX's default for it, asks for something that is not done here; or the files hold
            no model, so that its kind is not known.
    """
    _raise_first([*_attention(settings), *_given(settings)])
    settings.need("num_layers")
    settings.need("hidden_size")
    _raise_first([*_defaults(settings)])


def _raise_first(refusals: list[Refusal]) -> None:
    if not refusals:
        return
    others = list(dict.fromkeys(key for key, _ in refusals[1:]))
    more = f"; not supported either: {', '.join(others)}" if others else ""
    raise ConfigError(f"GPT-NeoX key {refusals[0][1]}{more}")


def _attention(settings: NeoxSettings) -> Iterator[Refusal]:
    """attention_config: [[[kinds], repeats], ...]."""
    config = settings.get("attention_config")
    blocks = config if isinstance(config, list) else [] if config is None else [config]
    kinds = [kind for block in blocks for kind in _kinds(block)]
    if other := sorted({str(kind) for kind in kinds if kind not in ("global", "flash")}):
        yield (
            "attention_config",
            f"'attention_config' names {other}, which is not supported: attention is dense and causal, which GPT-NeoX "
            "calls 'global' or 'flash'",
        )


def _kinds(block: Any) -> list[Any]:
    kinds = block[0] if isinstance(block, list) and block else block
    return kinds if isinstance(kinds, list) else [kinds]


def _given(settings: NeoxSettings) -> Iterator[Refusal]:
    """The keys that the files set."""
    yield from _fixed(settings.values, FIXED)
    for key, what in OFF.items():
        value = settings.values.get(key)
        if value and not (isinstance(value, dict) and value.get("enabled") is False):
            yield key, f"{key!r} is {value!r}, which is not supported: {what}; a run without it is another run"
    yield from _fixed(settings.mapping("zero_optimization"), ZERO_FIXED, "zero_optimization.")
    yield from _fixed(settings.mapping("data_types"), DATA_TYPES, "data_types.")
    for key, value in settings.mapping("deepspeed_extra_args").items():
        if key not in INEFFECTIVE:
            name = f"deepspeed_extra_args.{key}"
            yield name, f"{name!r} is {value!r}, which is not supported: DeepSpeed's own settings are made here"


def _fixed(values: Mapping[str, Any], table: Mapping[str, Fixed], prefix: str = "") -> Iterator[Refusal]:
    for key, rule in table.items():
        value = values.get(key)
        if value is not None and not _accepted(value, rule):
            yield prefix + key, _describe(prefix + key, value, "", rule)


def _defaults(settings: NeoxSettings) -> Iterator[Refusal]:
    for key, rule in FIXED.items():
        default = rule.default_today if settings.today and rule.default_today is not None else rule.default
        if settings.values.get(key) is None and default is not None and not _accepted(default, rule):
            yield key, _describe(key, default, " (GPT-NeoX's default, as the files don't set it)", rule)


def _describe(name: str, value: Any, source: str, rule: Fixed) -> str:
    accepted = ", ".join(map(repr, rule.accepted))
    return f"{name!r} is {value!r}{source}, which is not supported: {rule.reason}; accepted: {accepted}"


def _accepted(value: Any, rule: Fixed) -> bool:
    """Equality that keeps True and 1 apart, but not 0 and 0.0."""
    return any(
        value == accepted and isinstance(value, bool) == isinstance(accepted, bool) for accepted in rule.accepted
    )
