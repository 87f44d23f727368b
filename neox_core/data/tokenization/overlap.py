"""Overlap of training text with evaluation items: a run of n words that both hold.

Words are runs of letters, digits and underscores, in lower case, so that spacing and punctuation hide nothing. The
Llemma paper looks for 30-grams (arXiv 2310.10631, section 2.1).
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from neox_core.errors import ConfigError, DataError

_WORD = re.compile(r"\w+")
_IDENTIFIERS = ("id", "name")
_SHOWN = 400


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
    """The texts to look for, indexed so that a document costs one look-up per n/2 words."""

    def __init__(self, items: Sequence[Item], words: int) -> None:
        # A run of n words in a document holds one that begins at a multiple of `stride` and is n - stride + 1 long.
        self.words, self._stride = words, (words + 1) // 2
        self._anchor = words - self._stride + 1
        self.items = tuple(items)
        self._places: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for number, item in enumerate(self.items):
            if len(item.words) >= words:
                for start in range(len(item.words) - self._anchor + 1):
                    self._places[hash(item.words[start : start + self._anchor])].append((number, start))

    def hits(self, text: str) -> list[Hit]:
        """The items that share at least n words in a row with the text, each once, in the items' order."""
        words = tuple(_WORD.findall(text.lower()))
        longest: dict[int, tuple[int, int]] = {}
        for start in range(0, len(words) - self._anchor + 1, self._stride):
            for number, place in self._places.get(hash(words[start : start + self._anchor]), ()):
                first, length = _shared(words, start, self.items[number].words, place)
                if length >= max(self.words, longest.get(number, (0, 0))[1]):
                    longest[number] = (first, length)
        return [
            Hit(self.items[number], length, " ".join(words[first : first + length])[:_SHOWN])
            for number, (first, length) in sorted(longest.items())
        ]


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
def load_items(paths: tuple[Path, ...], words: int) -> EvaluationItems:
    """Read evaluation sets, JSON lines: every text of an item but its id and name is looked for.

    Raises:
        ConfigError: a file does not exist.
        DataError: a line is not a JSON object.
    """
    return EvaluationItems([item for number, path in enumerate(paths) for item in _items_of(number, path)], words)


def _items_of(set_number: int, path: Path) -> Iterator[Item]:
    if not path.is_file():
        raise ConfigError(f"data.evaluation_sets: {path} does not exist: correct the path")
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            record: Any = json.loads(line)  # which takes NaN, as the sets' own tools write it; they are small
        except ValueError as error:
            raise DataError(f"evaluation set {path}, line {number} is not JSON ({error}): correct it") from None
        if not isinstance(record, dict):
            raise DataError(f"evaluation set {path}, line {number} is not a JSON object: correct it")
        name = str(record.get("id", f"line {number}"))
        for field, value in record.items():
            texts = value if isinstance(value, list) else [value]
            for text in texts if field not in _IDENTIFIERS else ():
                if isinstance(text, str):
                    yield Item(set_number, name, field, tuple(_WORD.findall(text.lower())))
