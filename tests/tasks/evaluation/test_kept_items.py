"""Items kept per checkpoint, and what is computed from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from neox_core.errors import DataError
from neox_core.evaluation.scores import scores, solution_record
from tasks.evaluation.kept_items import compare, inherit_items, items_file, keep_items, load_items


def result(step: int) -> dict[str, Any]:
    records = [{"id": f"i/{n}", "prompt": "½?", **solution_record(-9.0 + n + step, "abcd")} for n in range(5)]
    task = {"items": 5, "left_out": 0, "metrics": scores(records), "records": records}
    return {"step": step, "sources": {}, "tasks": {"sums": task}}


def test_items_come_back_and_the_summary_is_small(tmp_path: Path) -> None:
    kept = keep_items(tmp_path, result(25))
    assert "records" not in kept["tasks"]["sums"]
    assert load_items(tmp_path, "sums", 25) == result(25)["tasks"]["sums"]["records"]
    with pytest.raises(DataError, match=r"no items of task 'sums' at step 50 .*: there are steps \['25'\]"):
        load_items(tmp_path, "sums", 50)
    with pytest.raises(DataError, match=r"there are tasks \['sums'\]"):
        load_items(tmp_path, "products", 25)


def test_differences_from_the_base_and_the_checkpoint_before(tmp_path: Path) -> None:
    results = {step: keep_items(tmp_path, result(step)) for step in (0, 2, 3)}
    found = compare(tmp_path, results)
    assert "from_base" not in found[0]["tasks"]["sums"]
    bit = 5 / 20 / 0.6931471805599453  # a nat more on each of 5 items of 4 bytes
    third = found[3]["tasks"]["sums"]
    assert third["from_base"]["bits_per_byte"]["value"] == pytest.approx(-3 * bit)
    assert third["from_previous"]["bits_per_byte"]["value"] == pytest.approx(-bit)
    assert (found[2]["compared_with"], found[3]["compared_with"]) == (0, 2)
    assert compare(tmp_path, found) == found
    # A checkpoint in between changes what is before the last.
    found[1] = keep_items(tmp_path, result(1))
    assert compare(tmp_path, found)[2]["compared_with"] == 1


def test_results_without_tasks(tmp_path: Path) -> None:
    results = {step: keep_items(tmp_path, {"step": step, "sources": {}}) for step in (0, 1)}
    assert compare(tmp_path, results) == results


def test_inherited_items(tmp_path: Path) -> None:
    keep_items(tmp_path / "old", result(2))
    inherit_items(tmp_path / "new", tmp_path / "old", [2, 4])
    assert load_items(tmp_path / "new", "sums", 2) == load_items(tmp_path / "old", "sums", 2)
    assert not items_file(tmp_path / "new", "sums", 4).exists()
