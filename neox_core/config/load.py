"""YAML to RunConfig, with errors that name the key, the value and the nearest right spelling."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from neox_core.config.overrides import parse_overrides
from neox_core.config.schema import RunConfig
from neox_core.config.yaml_file import read_yaml
from neox_core.errors import ConfigError

_INCLUDE = "include"


def merge(base: Mapping[str, Any], override: Mapping[str, Any], within: str = "") -> dict[str, Any]:
    """Merge nested mappings; `override` wins, other values are kept.

    Args:
        within: the dotted key of the two, for messages.

    Raises:
        ConfigError: an empty mapping overrides one that is not, which would have no effect.
    """
    merged = dict(base)
    for key, value in override.items():
        known = merged.get(key)
        if not (isinstance(value, Mapping) and isinstance(known, Mapping)):
            merged[key] = value
            continue
        name = f"{within}{key}"
        if known and not value:
            raise ConfigError(
                f"{name} is {{}}, which changes nothing of the {name} below it ({', '.join(map(str, known))}): "
                "sections are merged key by key, so leave it out, or set its keys one by one"
            )
        merged[key] = merge(known, value, f"{name}.")
    return merged


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> RunConfig:
    """Load a run's configuration; the file may `include:` others (a name or a list), which it overrides.

    Those names are relative to the folder of the file that includes; all other relative paths to the folder of `path`.

    Args:
        overrides: `key=value` texts that override the file; see `parse_overrides`.

    Raises:
        ConfigError: anything that keeps the configuration from being run, in one line.
    """
    path = Path(path)
    content = merge(_with_includes(path, seen=()), parse_overrides(overrides))
    origin = f"{path} with {', '.join(overrides)}" if overrides else str(path)
    return parse_config(content, base=path.parent, origin=origin)


def parse_config(content: Mapping[str, Any], base: Path, origin: str = "config") -> RunConfig:
    """Validate a nested mapping. Relative paths are relative to `base`; `origin` names it in errors.

    Raises:
        ConfigError: a key is unknown, missing or has a wrong value.
    """
    try:
        return RunConfig.model_validate(content, context={"base": base.resolve()})
    except ValidationError as error:
        # A misspelt key also counts as missing under its right name: show the misspelling first.
        ordered = sorted(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
        problems = [_describe(problem) for problem in ordered]
        more = f" (and {len(problems) - 1} more: {'; '.join(problems[1:3])})" if len(problems) > 1 else ""
        raise ConfigError(f"{origin}: {problems[0]}{more}") from None


def _with_includes(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in seen:
        raise ConfigError(f"config file {path} includes itself")
    content = read_yaml(path)
    names = content.pop(_INCLUDE, [])
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"config file {path}: include is {names!r}: give a file's name or a list of names")
    merged: dict[str, Any] = {}
    for name in names:
        merged = merge(merged, _with_includes(path.parent / name, (*seen, path.resolve())))
    return merge(merged, content)


def _describe(problem: Any) -> str:
    """One line for one pydantic error, with the dotted key and a suggestion."""
    location = [str(part) for part in problem["loc"]]
    key = ".".join(location)
    if problem["type"] == "extra_forbidden":
        nearest = difflib.get_close_matches(location[-1], _keys_at(location[:-1]), n=1, cutoff=0.5)
        hint = f": did you mean {'.'.join([*location[:-1], nearest[0]])!r}?" if nearest else ""
        known = "" if nearest else f"; known keys: {', '.join(_keys_at(location[:-1]))}"
        return f"unknown key {key!r}{hint}{known}"
    if problem["type"] == "missing":
        return f"key {key!r} is missing: add it"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return f"{key}: {message}" if key else message
    return f"{key} is {problem['input']!r}: {message}"


def _keys_at(location: list[str]) -> list[str]:
    """Names of the keys that the schema knows below `location`."""
    section: type[BaseModel] = RunConfig
    for part in location:
        if part not in section.model_fields:  # a user-named entry, such as a source
            continue
        annotation: Any = section.model_fields[part].annotation
        candidates = [annotation, *get_args(annotation)]
        section = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), section)
    return list(section.model_fields)
