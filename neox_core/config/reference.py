"""The configuration reference, a page in Markdown, made from the sections' own types, defaults and descriptions."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import annotated_types
from pydantic.fields import FieldInfo

from neox_core.config.schema import RunConfig
from neox_core.config.section import Section

_HEAD = """# Configuration

<!-- Made by `make docs` from the field descriptions in neox_core/config. Do not edit. -->

One YAML file. `include:` names a file or a list of files, from the folder of the file that includes them; they are
merged below it, key by key: a source of an included mixture is left out with `weight: 0`, and needs no text then. Other
relative paths, those in included files too, are relative to the folder of the file that is run. An unknown key is an
error that names the nearest right one. A key without a default must be given. None is YAML's `null`.
"""


@dataclass(frozen=True)
class Key:
    """A key of the YAML file."""

    path: str
    """As in train.optimizer.lr; [] for an item of a list, <name> for a name of the user's choice."""
    section: type[Section] | None
    """What lies below it, if it is a section."""
    field: FieldInfo

    @property
    def description(self) -> str:
        """What it is; a section's own if the key says nothing more."""
        own = self.field.description or ""
        return own or (_first_paragraph(self.section) if self.section else "")


def keys(section: type[Section] = RunConfig, prefix: str = "") -> Iterator[Key]:
    """All keys, section by section, each before those below it."""
    for name, field in section.model_fields.items():
        inner = next(_sections(field.annotation), None)
        yield Key(prefix + name, inner, field)
        if inner:
            yield from keys(inner, prefix + name + _suffix(field.annotation) + ".")


def reference_page() -> str:
    """The whole page."""
    found = list(keys())
    top = [key for key in found if "." not in key.path]
    parts = [_HEAD, "\n## The run\n", _table([key for key in top if not key.section])]
    for key in top:
        if key.section:
            below = [inner for inner in found if inner.path.startswith(key.path + ".")]
            parts += [f"\n## {key.path}\n\n{_text(key.description)}\n", _table(below)]
    return "\n".join(parts)


def _table(listed: list[Key]) -> str:
    rows = [f"| `{key.path}` | {_type(key)} | {_default(key)} | {_text(key.description)} |\n" for key in listed]
    return "| key | value | default | what it is |\n|---|---|---|---|\n" + "".join(rows)


def _text(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def _first_paragraph(section: type[Section]) -> str:
    return " ".join((section.__doc__ or "").split("\n\n")[0].split())


def _default(key: Key) -> str:
    value = key.field.default
    if key.field.is_required():
        return ""
    if isinstance(value, Section):
        return "see below"
    if value is None:
        return "`null`"
    shown = list(value) if isinstance(value, tuple) else value
    return f"`{str(shown).lower() if isinstance(shown, bool) else shown}`"


def _type(key: Key) -> str:
    if key.section:
        return {"": "section", "[]": "list of sections"}.get(_suffix(key.field.annotation), "section per name")
    limits = [text for item in key.field.metadata if (text := _limit(item))]
    return ", ".join([_words(key.field.annotation), *limits])


_NAMES: dict[Any, str] = {
    bool: "true, false",
    int: "integer",
    float: "number",
    str: "text",
    Path: "path",
    Any: "any value",
}


def _words(annotation: Any) -> str:
    """A type in plain words, without None, which the default and the description tell of."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        limits = [text for item in inner[1:] if (text := _limit(item))]
        return ", ".join([_words(inner[0]), *limits])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in inner)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(_words(part) for part in inner if part is not type(None)))
    if origin is tuple:
        return f"list of: {_words(inner[0])}"
    if origin is dict:
        return f"{_words(inner[1])} per {_words(inner[0])}"
    return _NAMES.get(annotation, str(annotation))


def _limit(item: Any) -> str:
    if isinstance(item, FieldInfo):
        return ", ".join(text for inner in item.metadata if (text := _limit(inner)))
    signs = {annotated_types.Gt: ("above", "gt"), annotated_types.Ge: ("at least", "ge")}
    signs |= {annotated_types.Lt: ("below", "lt"), annotated_types.Le: ("at most", "le")}
    word, name = signs.get(type(item), ("", ""))
    return f"{word} {getattr(item, name)}" if word else ""


def _sections(annotation: Any) -> Iterator[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for part in get_args(annotation):
        yield from _sections(part)


def _suffix(annotation: Any) -> str:
    """How a section's keys are reached: once, in a list, or under names."""
    parts = [annotation, *get_args(annotation)]
    origins = {get_origin(part) for part in parts}
    return "[]" if tuple in origins else ".<name>" if dict in origins else ""


if __name__ == "__main__":
    import sys

    Path(sys.argv[1]).write_text(reference_page())
