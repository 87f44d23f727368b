"""Values from the command line in place of the file's: `train.steps=100`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml

from neox_core.config.yaml_file import parse_yaml
from neox_core.errors import ConfigError


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """Nested mappings of `key=value` texts, with dotted keys and YAML's values; the last of two of a key counts.

    Raises:
        ConfigError: a text is not of that form, its value is not YAML, or a key is given as a value and as a section.
    """
    content: dict[str, Any] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        *sections, name = key.split(".")
        if not equals or not all((*sections, name)):
            raise ConfigError(f"--set {override!r} is not of the form section.key=value, such as train.steps=100")
        place = content
        for section in sections:
            place = place.setdefault(section, {})
            if not isinstance(place, dict):
                raise ConfigError(f"--set {override!r} sets a key below {section!r}, which another --set gives a value")
        place[name] = _value(override, text)
    return content


def _value(override: str, text: str) -> Any:
    try:
        return parse_yaml(text)
    except ConfigError as error:
        raise ConfigError(f"--set {override!r}: {str(error).removeprefix('line 1: ')}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override!r}: the value is not YAML: {' '.join(str(error).split())}") from None
