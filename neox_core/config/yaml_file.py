"""YAML files, read so that a value is what was written.

YAML 1.1 has surprises that PyYAML keeps: 24:00:00 is the number 86400, 010 is 8, no is false, 2026-01-01 a date, and of
a key given twice the last one counts. All are refused with the spelling to use; quoted values are text, as ever.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from neox_core.errors import ConfigError

_MERGE = "tag:yaml.org,2002:merge"
_SWITCH = re.compile(r"yes|no|on|off", re.IGNORECASE)
_OCTAL = re.compile(r"[-+]?0[0-9_]+")


class _Loader(yaml.SafeLoader):
    """SafeLoader without the surprises."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    """Merge keys (<<) are YAML's own; any other key may be given once, and wins over merged ones."""
    keys = [loader.construct_object(key, deep=True) for key, _ in node.value if key.tag != _MERGE]
    for key in keys:
        if keys.count(key) > 1:
            raise ConfigError(f"line {node.start_mark.line + 1}: key {key!r} is given more than once")
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


def _switch(loader: _Loader, node: yaml.ScalarNode) -> bool:
    if _SWITCH.fullmatch(node.value):
        raise _refused(node, "yes or no", "write true or false")
    return loader.construct_yaml_bool(node)


def _whole(loader: _Loader, node: yaml.ScalarNode) -> int:
    text = node.value.replace("_", "")
    if ":" in text:
        raise _refused(node, f"{loader.construct_yaml_int(node)}", "write that number, if it is meant")
    if _OCTAL.fullmatch(text):
        octal = loader.construct_yaml_int(node)
        raise _refused(node, f"octal, {octal}", f"write {octal} or {int(text)}")
    return loader.construct_yaml_int(node)


def _number(loader: _Loader, node: yaml.ScalarNode) -> float:
    if ":" in node.value:
        raise _refused(node, f"{loader.construct_yaml_float(node)}", "write that number, if it is meant")
    return loader.construct_yaml_float(node)


def _date(loader: _Loader, node: yaml.ScalarNode) -> Any:
    raise _refused(node, "a date", "no key here takes one")


def _refused(node: yaml.ScalarNode, what: str, advice: str) -> ConfigError:
    return ConfigError(
        f"line {node.start_mark.line + 1}: {node.value} without quotes is {what} in YAML: {advice}, or put it in "
        f"quotes: '{node.value}'"
    )


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
for _tag, _constructor in (
    ("bool", _switch),
    ("int", _whole),
    ("float", _number),
    ("timestamp", _date),
):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _constructor)


def parse_yaml(text: str) -> Any:
    """The value that a YAML text holds.

    Raises:
        ConfigError: a key is repeated, or a value is read as something else than it looks like.
        yaml.YAMLError: it is not YAML.
    """
    return yaml.load(text, Loader=_Loader)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read one YAML file whose top level is a mapping.

    Raises:
        ConfigError: the file is missing, is not YAML, repeats a key, is not a mapping, or has a value that YAML reads
            as something else than it looks like.
    """
    try:
        content = parse_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"config file {path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {path} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"config file {path} is not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise ConfigError(f"config file {path} is nested too deeply, or contains itself") from None
    except ConfigError as error:
        raise ConfigError(f"config file {path}, {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"config file {path} must hold a mapping of sections, not {type(content).__name__}")
    return content
