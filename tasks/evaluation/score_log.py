"""The scores of each checkpoint in Weights & Biases: a run of its own next to the training's, which a job may hold."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from neox_core.config import RunConfig
from neox_core.train.observe.metrics import start_wandb
from tasks.evaluation.kept_items import Result, scored_tasks


class ScoreLog:
    """Started with the first scores; an evaluation that is gone on with continues its run.

    Args:
        folder: of the evaluation, for W&B's files in mode offline.
        run_id: the evaluation's fingerprint.
    """

    def __init__(self, config: RunConfig, folder: Path, run_id: str) -> None:
        self._config, self._folder, self._run_id = config, folder, run_id
        self._run: Any = None

    def __enter__(self) -> ScoreLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._run is not None:
            self._run.finish(exit_code=int(error is not None))

    def log(self, result: Result) -> None:
        """Record a checkpoint's scores: each metric with the ends of its interval, and a table of all."""
        rows = score_rows(result)
        if not rows or self._config.wandb.mode == "disabled":
            return
        if self._run is None:
            name = f"{self._config.name}-evaluate"
            self._run = start_wandb(self._config, self._folder, self._run_id, name)
        import wandb

        values = {f"{row['task']}/{row['metric']}{end}": row[key] for row in rows for end, key in _ENDS.items()}
        table = wandb.Table(columns=list(rows[0]), data=[list(row.values()) for row in rows])
        self._run.log({"step": result["step"], "scores": table, **values})


_ENDS = {"": "value", " low": "low", " high": "high"}


def score_rows(result: Result) -> list[dict[str, Any]]:
    """Step, task, metric, value, low, high, items: a row per score."""
    return [
        {"step": result["step"], "task": task, "metric": metric, **_interval(score), "items": scored["items"]}
        for task, scored in scored_tasks(result).items()
        for metric, score in scored["metrics"].items()
    ]


def _interval(score: Mapping[str, float]) -> dict[str, float]:
    return {key: score[key] for key in ("value", "low", "high")}
