"""Overlap with evaluation items, against its plain definition."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

from neox_core.data.tokenization.filters.overlap import EvaluationItems, Item, OverlapWords, load_items, set_names
from neox_core.data.tokenization.filters.words import words
from neox_core.errors import ConfigError, DataError
from tests.paths import SHARED

EVALUATION = SHARED / "data" / "eval"


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

    def some_words(count: int) -> str:
        return " ".join(rng.choice("abcdefgh"[: max(2, 9 - n)]) + rng.choice(["", ",", "."]) for _ in range(count))

    items = [some_words(rng.randrange(1, 20)) for _ in range(60)]
    looked_for = EvaluationItems(
        [Item(0, str(i), "q", tuple(re.findall(r"\w+", t))) for i, t in enumerate(items)], OverlapWords(n, n)
    )
    both = 0
    for _ in range(150):
        text = some_words(rng.randrange(1, 40)).upper()
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
    record = {
        "id": "x/1",
        "name": "not looked for",
        "question": "Is it?",
        "options": ["Yes, it", 3, float("nan")],
        "answer": None,
    }
    path.write_text(json.dumps(record) + "\n\n" + json.dumps({"question": "Why"}) + "\n")
    items = load_items((path,), OverlapWords(2, 2)).items
    assert [(item.set_number, item.item, item.field, item.words) for item in items] == [
        (0, "x/1", "question", ("is", "it")),
        (0, "x/1", "options", ("yes", "it")),
        (0, "line 3", "question", ("why",)),
    ]
    with pytest.raises(ConfigError, match=r"nowhere\.jsonl does not exist"):
        load_items((tmp_path / "nowhere.jsonl",), OverlapWords(2, 2))
    path.write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(DataError, match="is a git-lfs pointer, not the file itself"):
        load_items((path,), OverlapWords(4, 4))
    path.write_text("[1]\n")
    with pytest.raises(DataError, match="line 1 is not a JSON object"):
        load_items((path,), OverlapWords(3, 3))


def test_texts_of_an_item_are_found_at_any_depth(tmp_path: Path) -> None:
    path, question = tmp_path / "set.jsonl", "How many mats did the seven cats sit on?"
    records: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": ["7", {"text": "a b"}]}]},
        {"data": {"question": question, "id": "x", "name": question, "turns": [[1, [question]]]}},
        {"id": "none", "answer": 7, "data": {"name": question}, "turns": []},
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    looked_for = load_items((path,), OverlapWords(30, 8))
    assert [(item.item, item.field, " ".join(item.words)) for item in looked_for.items] == [
        ("line 1", "messages.role", "user"),
        ("line 1", "messages.content", " ".join(words(question))),
        ("line 1", "messages.role", "assistant"),
        ("line 1", "messages.content", "7"),
        ("line 1", "messages.content.text", "a b"),
        ("line 2", "data.question", " ".join(words(question))),
        ("line 2", "data.turns", " ".join(words(question))),
        ("none", "", ""),
    ]
    found = looked_for.hits(f"The user and assistant, 7: {question}")
    assert {(hit.item.item, hit.item.field) for hit in found} == {
        ("line 1", "messages.content"),
        ("line 2", "data.question"),
        ("line 2", "data.turns"),
    }
    assert looked_for.coverage(["set"]) == {"set": {"items": 3, "by_runs": 0, "as_a_whole": 2, "not_checked": 1}}


def test_a_set_with_nothing_to_look_for_is_refused(tmp_path: Path) -> None:
    good, path = tmp_path / "good.jsonl", tmp_path / "set.jsonl"
    good.write_text('{"question": "Why?"}\n')
    for content in ("", "\n \n"):
        path.write_text(content)
        with pytest.raises(DataError, match=r"data\.evaluation_sets: .*/set\.jsonl holds no item: correct the path"):
            load_items((good, path), OverlapWords(2, 2))
    for content in ('{"name": "Who is it?"}\n{}', '{"answer": 1}', '{"question": ["?"]}'):
        path.write_text(content)
        with pytest.raises(DataError, match=r"no item of .*/set\.jsonl has a text to look for, apart from id and name"):
            load_items((good, path), OverlapWords(2, 2))


def test_an_item_of_great_depth_is_refused_or_read(tmp_path: Path) -> None:
    path = tmp_path / "set.jsonl"
    path.write_text('{"q": ' + "[" * 500 + '"why not"' + "]" * 500 + "}")
    assert [item.words for item in load_items((path,), OverlapWords(2, 2)).items] == [("why", "not")]
    path.write_text('{"q": ' + "[" * 100_000 + "]" * 100_000 + "}")
    with pytest.raises(DataError, match="line 1 is not JSON"):
        load_items((path,), OverlapWords(3, 3))


def test_an_id_that_is_null_is_the_line_as_where_items_are_scored(tmp_path: Path) -> None:
    path = tmp_path / "items.jsonl"
    path.write_text('{"id": null, "question": "one two"}\n')
    assert [item.item for item in load_items((path,), OverlapWords(2, 2)).items] == ["line 1"]


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
    looked_for = load_items((path,), OverlapWords(30, 8))
    checked = 0
    for line in path.read_text().splitlines()[:200]:
        record = json.loads(line)
        if len(re.findall(r"\w+", record["question"])) >= 30:
            hits = looked_for.hits(f"Some page.\n\n**{record['question']}**\n- an answer")
            assert record["id"] in [hit.item.item for hit in hits]
            checked += 1
    assert checked > 100


def item(text: str, number: int = 0, name: str = "q") -> Item:
    return Item(number, name, "question", words(text))


def test_shorter_texts_are_looked_for_as_a_whole() -> None:
    """And what has fewer words still is not looked for."""
    short, shorter = "What is the derivative of x squared plus one?", "What is two plus two?"
    looked_for = EvaluationItems([item(short), item(shorter, name="r")], OverlapWords(13, 8))
    page = "Quiz. what is the DERIVATIVE of x squared, plus one - "
    assert [hit.item.item for hit in looked_for.hits(page + "What is two plus two?")] == ["q"]
    assert looked_for.hits(page.replace("one", "two")) == []  # all but the last of its words
    assert looked_for.hits("What is the derivative of x squared plus") == []


@pytest.mark.parametrize("words_before", range(9))
def test_a_whole_text_is_found_wherever_it_begins(words_before: int) -> None:
    text = "one two three four five six seven eight nine"
    looked_for = EvaluationItems([item(text)], OverlapWords(30, 8))
    (hit,) = looked_for.hits("x " * words_before + text + " y z")
    assert (hit.length, hit.text) == (9, text)


def test_coverage_is_per_set_and_per_item() -> None:
    texts = [("a b " * 15, 0, "1"), ("a " * 10, 0, "1"), ("a " * 10, 0, "2"), ("a " * 3, 0, "3"), ("a " * 3, 1, "1")]
    looked_for = EvaluationItems([item(*text) for text in texts], OverlapWords(30, 8))
    assert looked_for.coverage(["first", "second"]) == {
        "first": {"items": 3, "by_runs": 1, "as_a_whole": 1, "not_checked": 1},
        "second": {"items": 1, "by_runs": 0, "as_a_whole": 0, "not_checked": 1},
    }


def test_most_items_of_the_real_sets_are_checked() -> None:
    """57% of them have 30 words in a row; nine in ten of the others can be looked for as a whole."""
    paths = tuple(sorted(EVALUATION.glob("*.jsonl")))
    if not paths:
        pytest.skip(f"{EVALUATION} is absent")
    coverage = load_items(paths, OverlapWords(30, 8)).coverage(set_names(paths)).values()
    total, not_checked, whole = (
        sum(counts[key] for counts in coverage) for key in ("items", "not_checked", "as_a_whole")
    )
    assert not_checked < 0.04 * total
    assert whole > 0.3 * total
