"""Duplicates and overlap with evaluation items, against plain definitions of both."""

from __future__ import annotations

import json
import os
import random
import re
import resource
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from neox_core.data.tokenization import duplicates
from neox_core.data.tokenization.duplicates import DOCUMENT, DocumentTable, find_duplicates, text_hash
from neox_core.data.tokenization.overlap import EvaluationItems, Item, load_items, set_names
from neox_core.data.tokenization.part_files import PartPaths, load_table
from neox_core.errors import ConfigError, DataError
from tests.paths import SHARED

EVALUATION = SHARED / "data" / "eval"


def table(texts: list[str]) -> DocumentTable:
    return np.array([(*text_hash(text), len(text), 1) for text in texts], dtype=DOCUMENT)


@pytest.mark.parametrize("bucket", [1 << 21, 7])
def test_duplicates_are_those_that_came_before(bucket: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "_BUCKET", bucket)
    rng = random.Random(6)
    parts = [[f"text {rng.randrange(40)}" for _ in range(count)] for count in (30, 0, 1, 25)]
    seen: set[str] = set()
    expected = []
    for part in parts:
        expected.append([text in seen or bool(seen.add(text)) for text in part])  # type: ignore[func-returns-value]
    found = find_duplicates([partial(table, part) for part in parts])
    assert [mask.tolist() for mask in found] == expected
    assert sum(map(sum, expected)) > 10


def test_more_tables_than_a_process_may_have_files(tmp_path: Path) -> None:
    paths = PartPaths(tmp_path / "part")
    np.save(paths.documents, table([f"text {number}" for number in range(3000)]))  # large enough to be mapped
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = set(map(int, os.listdir("/proc/self/fd")))
    free = [number for number in range(2000) if number not in taken]
    resource.setrlimit(resource.RLIMIT_NOFILE, (free[20], hard))
    try:
        found = find_duplicates([partial(load_table, paths)] * 40)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert [int(mask.sum()) for mask in found] == [0] + [3000] * 39


def test_hash_sees_every_byte() -> None:
    texts = ["", " ", "a", "A", "a ", "é", "e\u0301", "\x00"]
    assert len({text_hash(text) for text in texts}) == len(texts)


def plain_overlap(first: str, second: str, n: int) -> bool:
    """By definition: all n-grams of both."""
    grams = []
    for text in (first, second):
        words = re.findall(r"\w+", text.lower())
        grams.append({tuple(words[i : i + n]) for i in range(len(words) - n + 1)})
    return bool(grams[0] & grams[1])


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 8])
def test_overlap_is_that_of_the_definition(n: int) -> None:
    rng = random.Random(n)

    def words(count: int) -> str:
        return " ".join(rng.choice("abcdefgh"[: max(2, 9 - n)]) + rng.choice(["", ",", "."]) for _ in range(count))

    items = [words(rng.randrange(1, 20)) for _ in range(60)]
    looked_for = EvaluationItems(
        [Item(0, str(i), "q", tuple(re.findall(r"\w+", t))) for i, t in enumerate(items)], n
    )
    both = 0
    for _ in range(150):
        text = words(rng.randrange(1, 40)).upper()
        expected = [str(i) for i, item in enumerate(items) if plain_overlap(text, item, n)]
        hits = looked_for.hits(text)
        assert [hit.item.item for hit in hits] == expected
        both += 0 < len(expected) < len(items)
        for hit in hits:
            assert hit.length >= n
            assert hit.text in " ".join(re.findall(r"\w+", text.lower()))
    assert both > 5


def test_items_are_every_text_but_names(tmp_path: Path) -> None:
    path = tmp_path / "set.jsonl"
    record = {"id": "x/1", "name": "not looked for", "question": "Is it?", "options": ["Yes, it", 3, float("nan")], "answer": None}
    path.write_text(json.dumps(record) + "\n\n" + json.dumps({"question": "Why"}) + "\n")
    items = load_items((path,), 2).items
    assert [(item.set_number, item.item, item.field, item.words) for item in items] == [
        (0, "x/1", "question", ("is", "it")),
        (0, "x/1", "options", ("yes", "it")),
        (0, "line 3", "question", ("why",)),
    ]
    with pytest.raises(ConfigError, match=r"nowhere\.jsonl does not exist"):
        load_items((tmp_path / "nowhere.jsonl",), 2)
    path.write_text("[1]\n")
    with pytest.raises(DataError, match="line 1 is not a JSON object"):
        load_items((path,), 3)


def test_sets_are_named_by_the_shortest_end_of_their_paths() -> None:
    paths = ["/e/gsm8k/test.jsonl", "/e/mmlu/test.jsonl", "/e/math.jsonl", "/f/mmlu/test.jsonl"]
    assert set_names([Path(path) for path in paths]) == [
        "gsm8k/test.jsonl",
        "e/mmlu/test.jsonl",
        "math.jsonl",
        "f/mmlu/test.jsonl",
    ]
    assert set_names([Path("test.jsonl"), Path("a/test.jsonl")]) == ["test.jsonl", "a/test.jsonl"]
    assert set_names([Path("test.jsonl")]) == ["test.jsonl"]


def test_finds_every_long_item_of_the_real_sets() -> None:
    path = EVALUATION / "gsm8k_test.jsonl"
    if not path.exists():
        pytest.skip(f"{path} is absent")
    looked_for = load_items((path,), 30)
    checked = 0
    for line in path.read_text().splitlines()[:200]:
        record = json.loads(line)
        if len(re.findall(r"\w+", record["question"])) >= 30:
            hits = looked_for.hits(f"Some page.\n\n**{record['question']}**\n- an answer")
            assert record["id"] in [hit.item.item for hit in hits]
            checked += 1
    assert checked > 100
