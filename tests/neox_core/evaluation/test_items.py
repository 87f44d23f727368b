"""Evaluation sets: read, or refused with the place and the reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from neox_core.config import EvaluationTask
from neox_core.errors import ConfigError, DataError
from neox_core.evaluation.items import MAX_ITEM_BYTES, Item, load_item_set
from tests.paths import SHARED

GOOD = {"id": "a", "question": "1+{x}?", "solution": "2", "options": ["1", "2"], "answer": "b"}


def task(path: Path, **settings: Any) -> EvaluationTask:
    return EvaluationTask(items=path, **settings)


def written(folder: Path, *lines: Any) -> Path:
    path = folder / "items.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def test_solutions_and_choices(tmp_path: Path) -> None:
    path = written(tmp_path, GOOD, "", GOOD | {"id": "c"})
    solutions = load_item_set("t", task(path, limit=1))
    assert solutions.items == (Item("a", "Question: 1+{x}?\nAnswer:", (" 2",), 0),)
    choices = load_item_set("t", task(path, kind="choices", prompt="{question}\n{options}\n", shots_from=path, shots=1))
    assert choices.items[1] == Item("c", "1+{x}?\nA. 1\nB. 2\n", ("A", "B"), 1)
    assert choices.shots == "1+{x}?\nA. 1\nB. 2\nB\n\n"


@pytest.mark.parametrize(
    ("line", "kind", "message"),
    [
        ("{", "solution", r"t: .*items.jsonl, line 1 is not JSON"),
        ("[1]", "solution", "line 1 is not a JSON object"),
        ({"question": "q"}, "solution", "line 1 has no text 'solution'"),
        ({"question": 3, "solution": "2"}, "solution", "line 1 has no text 'question'"),
        ({"question": "q", "solution": " "}, "solution", "line 1 has no text 'solution'"),
        ({"question": "q" * MAX_ITEM_BYTES, "solution": "2"}, "solution", r"line 1 has 1,048,\d+ bytes"),
        (GOOD | {"options": "1"}, "choices", "line 1 has no list of texts 'options'"),
        (GOOD | {"options": ["1"]}, "choices", "line 1 has 1 options"),
        (GOOD | {"answer": "C"}, "choices", "'answer' names none of its 2 options"),
        (GOOD | {"answer": True}, "choices", "'answer' names none of its 2 options"),
        (GOOD | {"answer": None}, "choices", "'answer' names none of its 2 options"),
        (GOOD | {"options": ["1", " "]}, "choices", "line 1 has an option without text in 'options'"),
        ('{"question": "q", "solution": "1", "solution": "2"}', "solution", "field 'solution' is there twice"),
        (r'{"question": "\ud800", "solution": "1"}', "solution", "line 1 is not JSON of text .*surrogates"),
        ("[" * 100_000, "solution", "line 1 is not JSON of text"),
        ("", "solution", "holds no item"),
    ],
)
def test_bad_items(tmp_path: Path, line: Any, kind: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_item_set("t", task(written(tmp_path, line), kind=kind))


def test_two_items_of_one_id(tmp_path: Path) -> None:
    path = written(tmp_path, GOOD, GOOD | {"id": "c"}, GOOD | {"question": "2+2?"})
    with pytest.raises(DataError, match="line 3 has the id 'a' of line 1: give it one of its own"):
        load_item_set("t", task(path))
    nameless = written(tmp_path, GOOD | {"id": None}, GOOD | {"id": None})
    assert [item.id for item in load_item_set("t", task(nameless)).items] == ["line 1", "line 2"]


def test_missing_files_and_shots(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"evaluate.tasks.t: .*none.jsonl does not exist"):
        load_item_set("t", task(tmp_path / "none.jsonl"))
    path = written(tmp_path, GOOD)
    with pytest.raises(ConfigError, match="holds 1 items, and shots is 2"):
        load_item_set("t", task(path, shots_from=path, shots=2))
    with pytest.raises(ValueError, match="shots and shots_from go together"):
        task(path, shots=2)


def test_templates_without_a_field(tmp_path: Path) -> None:
    for settings in ({"target": "{ solution }"}, {"target": ""}, {"kind": "choices", "prompt": "Which? {}"}):
        with pytest.raises(ValueError, match=r"names no field, such as \{question\}: all items would be the same"):
            task(tmp_path / "items.jsonl", **settings)


def test_an_option_that_pandas_lost(tmp_path: Path) -> None:
    path = written(tmp_path, '{"question": "Which?", "options": [NaN, "One"], "answer": "A"}')
    found = load_item_set("t", task(path, kind="choices", prompt="{question}", score="texts"))
    assert found.items[0].choices == (" None", " One")


@pytest.mark.skipif(not (SHARED / "data" / "eval").is_dir(), reason="the public sets are not at hand")
def test_public_sets() -> None:
    folder = SHARED / "data" / "eval"
    assert len(load_item_set("g", task(folder / "gsm8k_test.jsonl")).items) == 1319
    prompt = "{question}\n{options}\nAnswer:"
    mmlu = load_item_set("m", task(folder / "mmlu_stem_test.jsonl", kind="choices", prompt=prompt))
    assert len(mmlu.items) == 3018
    informal = {"prompt": "{informal_statement}\n", "target": "{informal_proof}"}
    assert len(load_item_set("f", task(folder / "minif2f_isabelle_test.jsonl", **informal)).items) == 244
