"""`llemma evaluate` and its commands, as they are typed."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from flows import cli
from flows.cli.evaluation import _score_rows

Typed = Callable[..., str]


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Typed:
    """Runs `llemma evaluate`; returns what it prints, errors too."""

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["llemma", "evaluate", *arguments])
        with pytest.raises(SystemExit):
            cli.main()
        captured = capsys.readouterr()
        return captured.out + captured.err

    return run


def test_errors_are_one_line(typed: Typed, tmp_path: Path) -> None:
    assert "error: no model: give --model FOLDER" in typed()
    assert f"error: {tmp_path} holds no config.json" in typed("--model", str(tmp_path), "--out", str(tmp_path / "out"))
    assert "results.json does not exist" in typed("compare", str(tmp_path))
    assert "no items of task 'gsm8k_cot'" in typed("show", str(tmp_path), "gsm8k_cot")


def test_compare_and_show(typed: Typed, tmp_path: Path) -> None:
    score = {"value": 0.36, "low": 0.33, "high": 0.39}
    results = {"gsm8k_cot": {"items": 1319, "seconds": 1.0, "scores": {"greedy": score}}}
    (tmp_path / "results.json").write_text(json.dumps(results))
    text = typed("compare", str(tmp_path), "--paper", "llemma-7b")
    assert "36.0 (33.0 to 39.0, 1319 items)" in text
    assert "within noise" in text
    (tmp_path / "gsm8k_cot").mkdir()
    answer = {"text": "5", "answer": "5", "correct": False, "reason": "different"}
    records = [{"id": f"g/{n}", "prompt": "Q?", "gold": "6", "greedy": [answer]} for n in range(30)]
    (tmp_path / "gsm8k_cot" / "items.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    shown = typed("show", str(tmp_path), "gsm8k_cot", "--wrong", "--first", "21", "--count", "5")
    assert "gsm8k_cot: 21 to 25 of 30" in shown
    assert "g/20" in shown
    assert "g/25" not in shown


def test_items_are_shown_as_they_are(typed: Typed, tmp_path: Path) -> None:
    (tmp_path / "math").mkdir()
    answer = {"text": r"\sqrt[n]{x} [/b] :smile:", "answer": r"\sqrt[n]{x}", "correct": True, "reason": "text"}
    record = {"id": "[a](b)[/c]", "prompt": "[bold] of [0,1)?", "gold": r"\sqrt[n]{x}", "greedy": [answer]}
    (tmp_path / "math" / "items.jsonl").write_text(json.dumps(record) + "\n")
    shown = typed("show", str(tmp_path), "math")
    for text in ("[a](b)[/c]", "[bold] of [0,1)?", r"wrote: \sqrt[n]{x} [/b] :smile:"):
        assert text in shown
    assert "math: no row from 1 on of 0" in typed("show", str(tmp_path), "math", "--wrong")
    assert "math: no row from 9 on of 1" in typed("show", str(tmp_path), "math", "--first", "9")


def test_options_that_would_do_nothing(typed: Typed, tmp_path: Path) -> None:
    assert "use --other" in typed("show", str(tmp_path), "math", "--against", "3")
    assert "use --against STEP" in typed("show", str(tmp_path / "run.yml"), "math", "--other", str(tmp_path))
    assert "Invalid value for '--first'" in typed("show", str(tmp_path), "math", "--first", "0")
    assert "Invalid value for '--count'" in typed("show", str(tmp_path), "math", "--count", "-1")


def test_a_damaged_file_of_results(typed: Typed, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text("{")
    assert "results.json is not JSON" in typed("compare", str(tmp_path))


def test_one_item_has_no_interval(typed: Typed, tmp_path: Path) -> None:
    results = {"gsm8k_cot": {"items": 1, "scores": {"greedy": {"value": 0.0}}}}
    assert [row["95% interval"] for row in _score_rows(results)] == ["none"]
    (tmp_path / "results.json").write_text(json.dumps(results))
    assert "0.0 (1 items)" in typed("compare", str(tmp_path))


def test_a_task_of_which_nothing_was_scored_is_named() -> None:
    (row,) = _score_rows({"proofs": {"items": 0, "left_out": 9, "scores": {}}})
    assert (row["task"], row["95% interval"]) == ("proofs", "all 9 items were left out")


def test_log_likelihoods_are_no_shares() -> None:
    scores = {
        "accuracy": {"value": 0.25, "low": 0.2, "high": 0.3},
        "log_likelihood": {"value": -1.4, "low": -2.0, "high": -1.0},
    }
    rows = _score_rows({"mmlu_stem": {"items": 40, "scores": scores}})
    assert [(row["score"], row["value"]) for row in rows] == [
        ("accuracy, %", "25.0"),
        ("log-likelihood, nats", "-1.4000"),
    ]
