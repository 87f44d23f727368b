"""Optimizers by the name that `train.optimizer.kind` gives."""

from __future__ import annotations

from collections.abc import Callable

from neox_core.config import OptimizerConfig
from neox_core.errors import ConfigError
from neox_core.optimizer.adamw import AdamW
from neox_core.optimizer.rule import UpdateRule

Build = Callable[[OptimizerConfig], UpdateRule]


def _adamw(config: OptimizerConfig) -> AdamW:
    return AdamW(*config.betas, config.eps)


_KINDS: dict[str, Build] = {"adamw": _adamw}


def register_optimizer(kind: str, build: Build) -> None:
    """Make an optimizer known, in every process that plans or trains with it.

    Raises:
        ValueError: the name is taken.
    """
    if kind in _KINDS:
        raise ValueError(f"there is an optimizer {kind!r} already: give this one another name")
    _KINDS[kind] = build


def update_rule(config: OptimizerConfig) -> UpdateRule:
    """The optimizer of a configuration.

    Raises:
        ConfigError: its kind is not known.
    """
    if config.kind not in _KINDS:
        raise ConfigError(f"train.optimizer.kind is {config.kind!r}, known are {', '.join(sorted(_KINDS))}: use one")
    return _KINDS[config.kind](config)
