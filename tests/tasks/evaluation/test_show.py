"""Items as rows."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from neox_core.errors import DataError
from tasks.evaluation.kept_items import load_items
from tasks.evaluation.show import flipped, generated_items, is_right, rows


def choice(name: str, picked: int) -> dict[str, Any]:
    return {"id": name, "prompt": f"Which {name}?", "choices": [" A", " B"], "gold": 1, "picked": picked}


def solution(name: str, bits: float) -> dict[str, Any]:
    return {"id": name, "prompt": "1+1?", "choices": [" two"], "log_likelihood": -bits * 4 * math.log(2), "bytes": 4}


def written(name: str, correct: bool) -> dict[str, Any]:
    answer = {"text": " 5.", "answer": "5", "correct": correct, "reason": "text" if correct else "different"}
    return {"id": name, "prompt": "Q:", "gold": "5", "greedy": [answer]}


def test_wrong_choices_and_another_checkpoint() -> None:
    now, before = [choice("a", 1), choice("b", 0), choice("c", 0)], [choice("a", 0), choice("b", 0), choice("c", 1)]
    assert [row["item"] for row in rows(now, wrong=True)] == ["b", "c"]
    both = rows(now, before)
    assert [row["item"] for row in both] == ["a", "c", "b"]  # those that flipped first
    assert (both[0]["answer"], both[0]["other"], both[0]["right"]) == ("right: B", "wrong: A", "B")
    assert [row["item"] for row in flipped(now, before)] == ["a", "c"]


def test_solutions_have_no_right_and_wrong() -> None:
    found = rows([solution("a", 1.0), solution("b", 2.5), {"id": "c", "left_out": "long"}], wrong=True)
    assert [(row["item"], row["answer"]) for row in found] == [
        ("b", "2.500 bits per byte"),
        ("a", "1.000 bits per byte"),
    ]
    assert is_right(solution("a", 1.0)) is None


def test_items_of_another_set_with_the_same_ids() -> None:
    ours, theirs = [choice("line 1", 1), choice("line 2", 1)], [choice("line 1", 0), choice("line 2", 0)]
    theirs[0]["prompt"] = "Which one, in another set?"
    assert ["other" in row for row in rows(ours, theirs)] == [True, False]
    assert [row["item"] for row in flipped(ours, theirs)] == ["line 2"]
    with pytest.raises(DataError, match="none of the 2 items is among the 1 of the other evaluation"):
        rows(ours, theirs[:1])


def test_an_item_that_the_other_left_out() -> None:
    long = {"id": "a", "prompt": "1+1?", "choices": [" two"], "left_out": "it is long"}
    (row,) = rows([solution("a", 1.0)], [long])
    assert row["other"] == "left out: it is long"
    missing = {"id": "a", "prompt": "Which a?", "choices": [" A", " B"], "left_out": "its likelihood is not a number"}
    assert flipped([choice("a", 1)], [missing]) == flipped([missing], [choice("a", 1)]) == []


def test_written_answers(tmp_path: Path) -> None:
    (tmp_path / "gsm8k_cot").mkdir()
    path = tmp_path / "gsm8k_cot" / "items.jsonl"
    path.write_text("".join(json.dumps(written(name, name == "a")) + "\n" for name in "ab"))
    (row,) = rows(generated_items(tmp_path, "gsm8k_cot"), wrong=True)
    assert (row["item"], row["answer"]) == ("b", "wrong (different): 5; wrote: 5.")
    with pytest.raises(DataError, match=r"no items of task 'math' in .*: there are \['gsm8k_cot'\]"):
        generated_items(tmp_path, "math")


def test_lines_end_with_a_newline_alone(tmp_path: Path) -> None:
    path = tmp_path / "gsm8k_cot" / "items.jsonl"
    path.parent.mkdir()
    name = "a\u2028b\x85c\x1cd"
    path.write_text(json.dumps(written(name, True), ensure_ascii=False) + "\n", encoding="utf-8", newline="")
    assert [record["id"] for record in generated_items(tmp_path, "gsm8k_cot")] == [name]
    checkpoint = tmp_path / "items" / "sums" / "step-000003.jsonl"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_bytes(path.read_bytes())
    assert [record["id"] for record in load_items(tmp_path, "sums", 3)] == [name]
    path.write_text('{"id": ')
    with pytest.raises(DataError, match=r"items.jsonl is damaged .*: evaluate again"):
        generated_items(tmp_path, "gsm8k_cot")
