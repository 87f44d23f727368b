"""Evaluation sets as prompts and the texts whose likelihood is asked for."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from neox_core.config import EvaluationTask
from neox_core.config.evaluation_sections import TEMPLATE_FIELD
from neox_core.data.tokenization.filters.overlap import item_name
from neox_core.errors import ConfigError, DataError

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_NO_QUESTION = "Answer:"
"""The prompt that calibrates a choice."""
MAX_ITEM_BYTES = 1 << 20
"""A longer line is no evaluation item."""


@dataclass(frozen=True)
class Item:
    """A prompt, and what may follow it."""

    id: str
    prompt: str
    """The item's own, without the solved items before it."""
    choices: tuple[str, ...]
    """Of a solution the only one."""
    gold: int
    """Place of the right one."""


@dataclass(frozen=True)
class ItemSet:
    """An evaluation set, ready to be scored."""

    shots: str
    """The solved items that stand before each prompt."""
    items: tuple[Item, ...]


def load_item_set(name: str, task: EvaluationTask) -> ItemSet:
    """Read an evaluation set.

    Raises:
        ConfigError: a file does not exist, or holds fewer items than are to be shown.
        DataError: an item lacks a field or has one of another type, or there is none.
    """
    items = tuple(islice(_items(name, task, task.items), task.limit))
    if not items:
        raise DataError(f"evaluate.tasks.{name}: {task.items} holds no item: correct the path or the file")
    if task.shots_from is None:
        return ItemSet("", items)
    shown = list(islice(_items(name, task, task.shots_from), task.shots))
    if len(shown) < task.shots:
        raise ConfigError(
            f"evaluate.tasks.{name}: {task.shots_from} holds {len(shown)} items, and shots is {task.shots}: lower it"
        )
    return ItemSet("".join(f"{item.prompt}{item.choices[item.gold]}\n\n" for item in shown), items)


def asked_texts(item: Item, task: EvaluationTask, item_set: ItemSet) -> list[tuple[str, str]]:
    """Prompt and text of each likelihood that an item needs: each choice's, and of choices those without a question."""
    asked = [(item_set.shots + item.prompt, choice) for choice in item.choices]
    if task.kind == "choices":
        asked += [(_NO_QUESTION, " " + choice.lstrip()) for choice in item.choices]
    return asked


def _items(name: str, task: EvaluationTask, path: Path) -> Iterator[Item]:
    if not path.is_file():
        raise ConfigError(f"evaluate.tasks.{name}: {path} does not exist: put the items there or correct the path")
    for identity, record, where in read_records(path, f"evaluate.tasks.{name}: "):
        yield _item(task, where, identity, record)


def read_records(path: Path, owner: str = "") -> Iterator[tuple[str, dict[str, Any], str]]:
    """Each item's id, its fields, and where it stands, after the words that say whose it is.

    Raises:
        DataError: a line is no item, or has the id of another: items of two checkpoints are compared by their ids.
    """
    known: dict[str, int] = {}
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{owner}{path}, line {number}"
            identity, record = read_record(line, where, number)
            if identity in known:
                raise DataError(f"{where} has the id {identity!r} of line {known[identity]}: give it one of its own")
            known[identity] = number
            yield identity, record, where


def read_record(line: bytes, where: str, number: int) -> tuple[str, dict[str, Any]]:
    """A line's id, which is its number where it has none, and its fields.

    Raises:
        DataError: the line is too long, or no JSON object whose fields are there once and are text.
    """
    if len(line) > MAX_ITEM_BYTES:
        raise DataError(f"{where} has {len(line):,} bytes, {MAX_ITEM_BYTES:,} at most: take it out")
    try:
        record = json.loads(line, object_pairs_hook=_fields)
        json.dumps(record, ensure_ascii=False).encode()  # half a surrogate pair is JSON, but no text
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON of text ({error}): correct it") from None
    if not isinstance(record, dict):
        raise DataError(f"{where} is not a JSON object: correct it")
    return item_name(record, number), record


def _fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Fields by name. Of one that is there twice, JSON does not say which counts."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"field {name!r} is there twice")
        found[name] = value
    return found


def _item(task: EvaluationTask, where: str, identity: str, record: dict[str, Any]) -> Item:
    if task.kind == "solution":
        prompt = _filled(task.prompt, record, where)
        return Item(identity, prompt, (_after(prompt, _filled(task.target, record, where)),), 0)
    options = read_options(record.get(task.options), task.options, where)
    gold = read_gold(record.get(task.answer), task.answer, len(options), where)
    lines = "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))
    prompt = _filled(task.prompt, record | {"options": lines}, where)
    texts = LETTERS[: len(options)] if task.score == "letters" else options
    return Item(identity, prompt, tuple(_after(prompt, text) for text in texts), gold)


def _filled(template: str, record: Mapping[str, Any], where: str) -> str:
    """The template with the fields' texts; braces in those are left as they are."""

    def text(match: re.Match[str]) -> str:
        value = record.get(match.group(1))
        if not isinstance(value, str) or not value.strip():
            raise DataError(f"{where} has no text {match.group(1)!r}: correct it, or evaluate.tasks' templates")
        return value

    return TEMPLATE_FIELD.sub(text, template)


def _after(prompt: str, text: str) -> str:
    return text if not prompt or prompt[-1].isspace() else " " + text


def read_options(value: Any, field: str, where: str) -> list[str]:
    """An item's options.

    Raises:
        DataError: they are not 2 to 26 texts, or one is empty.
    """
    if isinstance(value, list):
        # pandas reads an option "None" of MMLU's tables as not a number, and files made with it hold NaN.
        value = ["None" if isinstance(option, float) and math.isnan(option) else option for option in value]
    if not isinstance(value, list) or not all(isinstance(option, str) for option in value):
        raise DataError(f"{where} has no list of texts {field!r}: correct it, or the task's `options`")
    if not all(option.strip() for option in value):
        raise DataError(f"{where} has an option without text in {field!r}: correct it, or take it out")
    if not 2 <= len(value) <= len(LETTERS):
        raise DataError(f"{where} has {len(value)} options, and there can be 2 to {len(LETTERS)}: take it out")
    return value


def read_gold(value: Any, field: str, options: int, where: str) -> int:
    """The right option's place, from its letter or number.

    Raises:
        DataError: there is no such option.
    """
    if isinstance(value, str) and len(value.strip()) == 1:
        value = LETTERS.find(value.strip().upper())
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < options:
        raise DataError(f"{where}: {field!r} names none of its {options} options: give its letter or number from 0")
    return value
