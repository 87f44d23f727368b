"""GPT-NeoX's keys that change nothing here, each with the reason; what asks for something else is refused before."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from neox_core.config.neox.keys import (
    DATA_TYPES,
    FIXED,
    INEFFECTIVE,
    OFF,
    PRECISION_KEYS,
    ZERO_FIXED,
    ZERO_INEFFECTIVE,
    Fixed,
)
from neox_core.config.neox.settings import NeoxSettings, require_known

Ineffective = tuple[str, Any, str]
"""Key, value, and why it changes nothing here."""


def ineffective_keys(settings: NeoxSettings) -> list[Ineffective]:
    """The keys that are set and change nothing, with the reason.

    Raises:
        ConfigError: a key within a section is unknown.
    """
    found: list[Ineffective] = []
    for key, value in settings.values.items():
        if value is None:
            found.append((key, None, "null is as if it were not set"))
        elif key in OFF:
            found.append((key, value, f"it is off here too: {OFF[key]}"))
        elif key in INEFFECTIVE:
            found.append((key, value, INEFFECTIVE[key]))
    found += _fixed(settings.values, FIXED)
    found += _precision(settings) + _placement(settings)
    found += _zero_optimization(settings.mapping("zero_optimization"))
    found += _data_types(settings.mapping("data_types"))
    return found


def _fixed(values: Mapping[str, Any], table: Mapping[str, Fixed], prefix: str = "") -> Iterator[Ineffective]:
    for key, rule in table.items():
        if values.get(key) is not None:
            yield prefix + key, values[key], f"always so: {rule.reason}"


def _precision(settings: NeoxSettings) -> list[Ineffective]:
    """What stands within bf16 and fp16 besides the switch."""
    found: list[Ineffective] = []
    for section, known in PRECISION_KEYS.items():
        for key, value in settings.mapping(section).items():
            require_known(key, known, section)
            if key not in ("enabled", "type"):
                found.append((f"{section}.{key}", value, "training is in bf16 or fp32, which need no loss scaling"))
    return found


def _placement(settings: NeoxSettings) -> list[Ineffective]:
    """The launcher and the kernel of the optimizer, where they are not those used here."""
    found: list[Ineffective] = []
    if (launcher := settings.get("launcher")) not in (None, "slurm"):
        found.append(("launcher", launcher, "jobs go to SLURM, or run on this machine: see launch.executor"))
    params = settings.mapping("optimizer").get("params")
    if isinstance(params, dict) and "torch_adam" in params:
        found.append(("optimizer.params.torch_adam", params["torch_adam"], "the optimizer's kernel is chosen here"))
    return found


def _zero_optimization(options: Mapping[str, Any]) -> Iterator[Ineffective]:
    for key, value in options.items():
        require_known(key, ZERO_FIXED.keys() | ZERO_INEFFECTIVE, "zero_optimization")
        if key in ZERO_INEFFECTIVE:
            yield f"zero_optimization.{key}", value, "it changes speed and memory, not numbers"
    yield from _fixed(options, ZERO_FIXED, "zero_optimization.")


def _data_types(options: Mapping[str, Any]) -> Iterator[Ineffective]:
    for key in options:
        require_known(key, DATA_TYPES.keys(), "data_types")
    yield from _fixed(options, DATA_TYPES, "data_types.")
