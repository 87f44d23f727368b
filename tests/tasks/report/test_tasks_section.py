"""The report's part on evaluation sets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tasks.report.page import ReportData, write_report
from tasks.report.tasks_section import flipped_rows, task_figures, task_rows


def score(value: float, **others: float) -> dict[str, float]:
    return {"value": value, "low": value - 0.1, "high": value + 0.2} | others


def evaluation(step: int, accuracy: float) -> dict[str, Any]:
    task: dict[str, Any] = {"items": 5, "left_out": 0, "metrics": {"accuracy": score(accuracy)}}
    if step:
        task |= {"from_base": {"accuracy": score(accuracy - 0.25, p=0.03)}, "from_previous": {}}
    source = {"tokens": 10, "bytes": 30, "loss": 1.0, "perplexity": 2.7, "bits_per_byte": 0.5}
    return {"step": step, "sources": {"arxiv": source}, "tasks": {"mmlu": task}}


EVALUATIONS = [evaluation(0, 0.25), evaluation(20, 0.35), evaluation(40, 0.5)]


def test_rows() -> None:
    assert task_rows(EVALUATIONS) == [
        {
            "task": "mmlu",
            "metric": "accuracy",
            "base": "0.2500 [0.1500, 0.4500]",
            "last": "0.5000 [0.4000, 0.7000]",
            "from base": "+0.2500 [+0.1500, +0.4500], p 0.03",
            "from the one before": "–",
        }
    ]
    assert task_rows([]) == []


def test_figures() -> None:
    figures = task_figures(EVALUATIONS)
    assert list(figures) == ["task mmlu accuracy"]
    assert '"y":[0.25,0.35,0.5]' in str(figures["task mmlu accuracy"])
    assert task_figures([{"step": 0, "sources": {}}]) == {}


def test_one_item_has_no_interval() -> None:
    one = {"items": 1, "left_out": 0, "metrics": {"bits_per_byte": {"value": 0.5}}}
    last = one | {"from_base": {"bits_per_byte": {"value": 0.0}}}
    found = [{"step": 0, "sources": {}, "tasks": {"sums": one}}, {"step": 5, "sources": {}, "tasks": {"sums": last}}]
    (row,) = task_rows(found)
    assert (row["base"], row["from base"]) == ("0.5000", "+0.0000")
    assert "NaN" not in str(task_figures(found)["task sums bits per byte"])


def test_a_score_without_the_items_that_overlap_stands_below() -> None:
    def apart(step: int, value: float, items: int) -> dict[str, Any]:
        found = evaluation(step, 0.5)
        found["tasks"]["mmlu"]["without_overlap"] = {"items": items, "metrics": {"accuracy": score(value)}}
        return found

    whole, row = task_rows([apart(0, 0.2, 4), apart(40, 0.3, 4)])
    assert (whole["metric"], whole["last"]) == ("accuracy", "0.5000 [0.4000, 0.7000]")
    assert row["metric"] == "accuracy, of the 4 items without overlap"
    assert (row["task"], row["from base"]) == ("mmlu", "–")
    assert (row["base"], row["last"]) == ("0.2000 [0.1000, 0.4000]", "0.3000 [0.2000, 0.5000]")
    assert len(task_rows([apart(0, 0.5, 5)])) == 1, "none overlaps"


def test_a_task_of_which_nothing_was_scored_is_named() -> None:
    long = {"items": 0, "left_out": 9, "metrics": {}}
    accuracy, proofs = task_rows([EVALUATIONS[0] | {"tasks": EVALUATIONS[0]["tasks"] | {"proofs": long}}])
    assert list(proofs) == list(accuracy)
    assert (proofs["task"], proofs["last"]) == ("proofs", "all items were left out")


def test_page(tmp_path: Path) -> None:
    row = {"item": "m/1", "prompt": "<b>Which?</b>", "right": "B", "answer": "right: B", "other": "wrong: A"}
    data = ReportData(title="run", evaluations=EVALUATIONS[::-1], flipped=flipped_rows({"mmlu": [row] * 12}))
    write_report(tmp_path / "report.html", data)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count("&lt;b&gt;Which?&lt;/b&gt;") == 10
    assert "<td>+0.2500 [+0.1500, +0.4500], p 0.03</td>" in page
    assert "<h3>task mmlu accuracy</h3>" in page
