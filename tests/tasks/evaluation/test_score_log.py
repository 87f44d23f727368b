"""Scores in W&B, written offline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tasks.evaluation import score_log
from tasks.evaluation.score_log import ScoreLog, score_rows, score_run
from tests.neox_core.train.small_training import CONFIG


def result(step: int) -> dict[str, Any]:
    score = {"value": 0.5, "low": 0.4, "high": 0.6}
    sources = {"arxiv": {"perplexity": 9.5, "bits_per_byte": 0.8}}
    return {"step": step, "sources": sources, "tasks": {"sums": {"items": 9, "metrics": {"accuracy": score}}}}


class Run:
    """Takes what a W&B run would."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.code: int | None = None

    def log(self, row: dict[str, Any]) -> None:
        self.rows.append(row)

    def finish(self, exit_code: int) -> None:
        self.code = exit_code


RUN = score_run("e" * 64, "f" * 64)


def test_scores_are_logged_in_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, started = Run(), []

    def start(*arguments: Any) -> Run:
        started.append(arguments[2])
        return run

    monkeypatch.setattr(score_log, "start_wandb", start)
    with ScoreLog(CONFIG, tmp_path, RUN) as log:
        assert started == []
        log.log({"step": 0, "sources": {"arxiv": {"perplexity": 99.0, "bits_per_byte": 2.5}}, "tasks": {}})
        log.log(result(25))
    assert started == [RUN]
    assert run.rows[0] == {"step": 0, "arxiv/perplexity": 99.0, "arxiv/bits_per_byte": 2.5}
    assert (run.rows[1]["step"], run.rows[1]["arxiv/perplexity"]) == (25, 9.5)
    assert (run.rows[1]["sums/accuracy"], run.rows[1]["sums/accuracy low"]) == (0.5, 0.4)
    assert run.rows[1]["scores"].data == [[25, "sums", "accuracy", 0.5, 0.4, 0.6, 9]]
    assert run.code == 0


def test_a_score_without_an_interval() -> None:
    one = {"step": 5, "tasks": {"sums": {"items": 1, "metrics": {"bits_per_byte": {"value": 0.5}}}}}
    (row,) = score_rows(one)
    assert (row["value"], row["low"], row["high"]) == (0.5, None, None)


def test_nothing_where_it_is_disabled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score_log, "start_wandb", None)
    disabled = CONFIG.model_copy(update={"wandb": CONFIG.wandb.model_copy(update={"mode": "disabled"})})
    with ScoreLog(disabled, tmp_path, RUN) as log:
        log.log(result(0))
