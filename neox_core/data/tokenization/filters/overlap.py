"""Overlap of training text with evaluation items: a run of n words that both hold, or a shorter text as a whole.

The Llemma paper looks for 30-grams (arXiv 2310.10631, section 2.1), which most multiple-choice questions are shorter
than. What has too few words even to be looked for whole is counted as not checked.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from neox_core.data.tokenization.filters.words import words
from neox_core.errors import ConfigError, DataError
from neox_core.storage.stand_ins import stand_in

_IDENTIFIERS = ("id", "name")
_SHOWN = 400


@dataclass(frozen=True)
class OverlapWords:
    """From how many words on an overlap is one."""

    run: int
    """Words in a row of a text that has at least so many."""
    whole: int
    """Words of a shorter text, which is looked for as a whole."""


@dataclass(frozen=True)
class Item:
    """One text of an evaluation item, such as its question or its solution."""

    set_number: int
    """Place of its set in the configuration: sets may have the same file name."""
    item: str
    field: str
    words: tuple[str, ...]


@dataclass(frozen=True)
class Hit:
    """An evaluation text that shares words in a row with a document."""

    item: Item
    length: int
    """Words in a row."""
    text: str
    """Those words, shortened."""


class EvaluationItems:
    """The texts to look for."""

    def __init__(self, items: Sequence[Item], length: OverlapWords) -> None:
        self.items, self.length = tuple(items), length
        sizes = [len(item.words) for item in self.items]
        long = [number for number, size in enumerate(sizes) if size >= length.run]
        short = [number for number, size in enumerate(sizes) if length.whole <= size < length.run]
        self._indexes = [
            _Index(self.items, numbers, least) for numbers, least in ((long, length.run), (short, length.whole))
        ]

    def hits(self, text: str) -> list[Hit]:
        """The items that overlap with the text, each once, in the items' order."""
        found = words(text)
        longest: dict[int, tuple[int, int]] = {}
        for number, first, length in (run for index in self._indexes for run in index.runs(found)):
            least = min(self.length.run, len(self.items[number].words))
            if length >= max(least, longest.get(number, (0, 0))[1]):
                longest[number] = (first, length)
        return [
            Hit(self.items[number], length, " ".join(found[first : first + length])[:_SHOWN])
            for number, (first, length) in sorted(longest.items())
        ]

    def coverage(self, names: Sequence[str]) -> dict[str, dict[str, int]]:
        """Per set, how many items it has, and in how many the longest text is looked for by runs of words, as a whole,
        or not at all."""
        longest: dict[tuple[int, str], int] = defaultdict(int)
        for item in self.items:
            key = (item.set_number, item.item)
            longest[key] = max(longest[key], len(item.words))
        found = {name: dict.fromkeys(("items", "by_runs", "as_a_whole", "not_checked"), 0) for name in names}
        for (number, _), size in longest.items():
            how = "by_runs" if size >= self.length.run else "as_a_whole" if size >= self.length.whole else "not_checked"
            found[names[number]]["items"] += 1
            found[names[number]][how] += 1
        return found


class _Index:
    """Some texts, indexed so that a document costs one look-up per n/2 words."""

    def __init__(self, items: Sequence[Item], numbers: Sequence[int], least: int) -> None:
        # A run of n words in a document holds one that begins at a multiple of `stride` and is n - stride + 1 long.
        self._items, self._stride = items, (least + 1) // 2
        self._anchor = least - self._stride + 1
        self._places: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for number in numbers:
            text = items[number].words
            for start in range(len(text) - self._anchor + 1):
                self._places[hash(text[start : start + self._anchor])].append((number, start))

    def runs(self, found: Sequence[str]) -> Iterator[tuple[int, int, int]]:
        """Number of an item, and first word and length of what a document's words share with it."""
        if not self._places:
            return
        for start in range(0, len(found) - self._anchor + 1, self._stride):
            for number, place in self._places.get(hash(found[start : start + self._anchor]), ()):
                yield number, *_shared(found, start, self._items[number].words, place)


def _shared(ours: Sequence[str], at: int, theirs: Sequence[str], place: int) -> tuple[int, int]:
    """Where the run of equal words around two places begins in ours, and its length; 0 if the places differ."""
    before = 0
    while before < min(at, place) and ours[at - before - 1] == theirs[place - before - 1]:
        before += 1
    after = 0
    while after < min(len(ours) - at, len(theirs) - place) and ours[at + after] == theirs[place + after]:
        after += 1
    return at - before, before + after if after else 0


def set_names(paths: Sequence[Path]) -> list[str]:
    """For each evaluation set the shortest end of its path that no other set has."""
    return [_shortest_end(path, [other for other in paths if other != path]) for path in paths]


def _shortest_end(path: Path, others: Sequence[Path]) -> str:
    for length in range(1, len(path.parts)):
        if all(other.parts[-length:] != path.parts[-length:] for other in others):
            return "/".join(path.parts[-length:])
    return str(path)


@lru_cache(maxsize=1)
def load_items(paths: tuple[Path, ...], length: OverlapWords) -> EvaluationItems:
    """Read evaluation sets, JSON lines: every text of an item, however deep, but what is called id or name is looked
    for.

    Raises:
        ConfigError: a file does not exist.
        DataError: a line is not a JSON object, or a set has no item, or none with a text.
    """
    return EvaluationItems([item for number, path in enumerate(paths) for item in _items_of(number, path)], length)


def item_name(record: dict[str, Any], number: int) -> str:
    """An item's id, or its line where it has none; scores with and without overlap find items by it."""
    return f"line {number}" if record.get("id") is None else str(record["id"])


def _items_of(set_number: int, path: Path) -> list[Item]:
    """The texts of a set; an item without any has an empty one, so that it is counted."""
    found: list[Item] = []
    for number, record in _records(path):
        texts = list(_texts(record)) or [("", "")]
        found += [Item(set_number, item_name(record, number), field, words(text)) for field, text in texts]
    if not found:
        raise DataError(f"data.evaluation_sets: {path} holds no item: correct the path or the file")
    if not any(item.words for item in found):
        raise DataError(
            f"data.evaluation_sets: no item of {path} has a text to look for, apart from id and name: correct the path "
            "or the file"
        )
    return found


def _records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The items of a file, with the numbers of their lines."""
    if not path.is_file():
        raise ConfigError(f"data.evaluation_sets: {path} does not exist: correct the path")
    content = path.read_bytes()
    if instead := stand_in(content[:200]):
        raise DataError(f"evaluation set {path} is {instead}")
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            record: Any = json.loads(line)  # which takes NaN, as the sets' own tools write it; they are small
        except (ValueError, RecursionError) as error:
            raise DataError(f"evaluation set {path}, line {number} is not JSON ({error}): correct it") from None
        if not isinstance(record, dict):
            raise DataError(f"evaluation set {path}, line {number} is not a JSON object: correct it")
        yield number, record


def _texts(record: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The field of each text at any depth, such as messages.content, and the text, in their order."""
    left: list[tuple[str, Any]] = [("", record)]
    while left:
        field, value = left.pop()
        if isinstance(value, str):
            yield field, value
        elif isinstance(value, list):
            left += [(field, part) for part in reversed(value)]
        elif isinstance(value, dict):
            named = [(key, part) for key, part in value.items() if key not in _IDENTIFIERS]
            left += [(f"{field}.{key}" if field else key, part) for key, part in reversed(named)]
