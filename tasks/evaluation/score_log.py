"""The scores of each checkpoint in Weights & Biases: a run of its own next to the training's, which a job may hold."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from neox_core.config import RunConfig
from neox_core.train.observe.wandb_run import StartedRun, WandbRun, start_wandb
from tasks.evaluation.kept_items import Result, scored_tasks


def score_run(evaluation: str, training: str) -> WandbRun:
    """The evaluation's run of W&B, by the fingerprints."""
    return WandbRun(evaluation, "evaluate", training)


class ScoreLog:
    """Started with the first scores; an evaluation that is gone on with continues its run.

    Args:
        folder: the training's scratch folder, for W&B's files.
        run: see `score_run`.
    """

    def __init__(self, config: RunConfig, folder: Path, run: WandbRun) -> None:
        self._config, self._folder, self._identity = config, folder, run
        self._run: StartedRun | None = None

    def __enter__(self) -> ScoreLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._run is not None:
            self._run.finish(exit_code=int(error is not None))

    def log(self, result: Result) -> None:
        """Record a checkpoint's scores: each source's perplexity, each set's metrics with the ends of their intervals,
        and a table of these."""
        if self._config.wandb.mode == "disabled":
            return
        if self._run is None:
            self._run = start_wandb(self._config, self._folder, self._identity)
        import wandb

        values = {
            f"{source}/{measure}": scored[measure]
            for source, scored in result["sources"].items()
            for measure in ("perplexity", "bits_per_byte")
        }
        rows = score_rows(result)
        values |= {
            f"{row['task']}/{row['metric']}{end}": row[key]
            for row in rows
            for end, key in _ENDS.items()
            if row[key] is not None
        }
        if rows:
            values["scores"] = wandb.Table(columns=list(rows[0]), data=[list(row.values()) for row in rows])
        self._run.log({"step": result["step"], **values})


_ENDS = {"": "value", " low": "low", " high": "high"}


def score_rows(result: Result) -> list[dict[str, Any]]:
    """Step, task, metric, value, low, high (None without an interval), items: a row per score."""
    return [
        {"step": result["step"], "task": task, "metric": metric, **_interval(score), "items": scored["items"]}
        for task, scored in scored_tasks(result).items()
        for metric, score in scored["metrics"].items()
    ]


def _interval(score: Mapping[str, float]) -> dict[str, float | None]:
    return {key: score.get(key) for key in ("value", "low", "high")}
