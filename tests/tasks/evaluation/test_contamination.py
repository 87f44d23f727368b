"""Scores with and without the items that stand in the training text, found by prepare-data's own report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from neox_core.config import EvaluateConfig, EvaluationTask, RunConfig
from neox_core.evaluation.scores import scores, solution_record
from tasks.evaluation.contamination import overlapping_items, without_overlap
from tasks.evaluation.kept_items import keep_items
from tasks.tokenization.tokenize import prepare_data
from tests.neox_core.train.small_training import CONFIG

LEAKED = "seven cats sat on seven mats and each of them ate seven rats before noon on a very hot day"


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    """A run whose training text holds one of two items."""
    items = [{"id": "i/0", "question": LEAKED, "solution": "343"}, {"id": "i/1", "question": "1+1?", "solution": "2"}]
    path = tmp_path / "items.jsonl"
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    for source in CONFIG.data.sources:
        for split in ("train", "validation", "test"):
            (tmp_path / "text" / source / split).mkdir(parents=True)
            text = {"text": f"Once, {LEAKED}. That was all." if split == "train" else "nothing of the kind"}
            (tmp_path / "text" / source / split / "0.jsonl").write_text(json.dumps(text))
    update = {"input": str(tmp_path / "text"), "evaluation_sets": (path,), "overlap_words": 10, "workers": 1}
    data = CONFIG.data.model_copy(update=update)
    other = tmp_path / "other.jsonl"
    tasks = {"sums": EvaluationTask(items=path), "unknown": EvaluationTask(items=other)}
    return CONFIG.model_copy(
        update={"data": data, "evaluate": EvaluateConfig(tasks=tasks), "workdir": tmp_path / "work"}
    )


def test_items_in_the_training_text(config: RunConfig, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    prepare_data(config, folder, tmp_path / "parts")
    assert overlapping_items(config, folder) == {"sums": {"i/0"}}
    left_out = config.model_copy(update={"data": config.data.model_copy(update={"decontaminate": True})})
    assert overlapping_items(left_out, folder) == {}


def test_scores_without_them(tmp_path: Path) -> None:
    records: list[dict[str, Any]] = [
        {"id": f"i/{n}", "prompt": "?", **solution_record(-float(n + 1), "abcd")} for n in range(4)
    ]
    task = {"items": 4, "left_out": 0, "metrics": scores(records), "records": records}
    kept = keep_items(tmp_path, {"step": 0, "sources": {}, "tasks": {"sums": task, "unknown": task}})
    found = without_overlap(tmp_path, 0, kept["tasks"], {"sums": {"i/3"}})
    assert "without_overlap" not in found["unknown"]
    assert found["sums"]["without_overlap"] == {"items": 3, "metrics": scores(records[:3])}
    assert found["sums"]["metrics"] == scores(records)
