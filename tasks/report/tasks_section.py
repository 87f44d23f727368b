"""The report's part on evaluation sets: curves with intervals, base to last, and items that flipped."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from neox_core.evaluation.scores import Score, as_text
from tasks.evaluation.kept_items import scored_apart, scored_tasks
from tasks.report.figures import Rows, interval_figure

_LABELS = {
    "bits_per_byte": "bits per byte",
    "accuracy": "accuracy",
    "calibrated_accuracy": "calibrated accuracy",
    "log_likelihood": "log-likelihood among choices",
    "calibrated_log_likelihood": "calibrated log-likelihood",
    "greedy": "share right, greedy",
    "majority": "share right by majority",
    "sample": "share right of all samples",
}
_NOTHING = dict.fromkeys(("task", "metric", "base", "last", "from base", "from the one before"), "–")
"""A row of the table without values."""


def task_metrics(evaluations: Rows) -> list[tuple[str, str]]:
    """(task, metric) of all that was scored."""
    found = [
        (name, metric)
        for evaluation in evaluations
        for name, scored in scored_tasks(evaluation).items()
        for metric in scored["metrics"]
        if metric in _LABELS
    ]
    return list(dict.fromkeys(found))


def task_figures(evaluations: Rows) -> dict[str, str | None]:
    """A curve over checkpoints, with 95% intervals, by its heading on the page, `task NAME METRIC`."""
    figures = {}
    for task, metric in task_metrics(evaluations):
        points = [
            (evaluation["step"], scored_tasks(evaluation)[task]["metrics"][metric])
            for evaluation in evaluations
            if metric in scored_tasks(evaluation).get(task, {}).get("metrics", {})
        ]
        figures[f"task {task} {_LABELS[metric]}"] = interval_figure(
            points, f"{task}: {_LABELS[metric]}", _LABELS[metric]
        )
    return figures


def task_context(evaluations: Rows, charts: Iterable[str]) -> dict[str, Any]:
    """What the page's template reads: the names of the curves, and the table's rows."""
    ordered = sorted(evaluations, key=lambda evaluation: int(evaluation["step"]))
    return {"task_charts": [name for name in charts if name.startswith("task ")], "task_rows": task_rows(ordered)}


def task_rows(evaluations: Rows) -> list[dict[str, str]]:
    """Base and last of each metric, and the last's paired differences with their p-values; where items overlap the
    training text, both values without these too."""
    if not evaluations:
        return []
    first, last = evaluations[0], evaluations[-1]
    rows = []
    for task, metric in task_metrics([last]):
        scored = scored_tasks(last)[task]
        rows.append(
            {
                "task": task,
                "metric": _LABELS[metric],
                "base": _value(first, task, metric),
                "last": _value(last, task, metric),
                "from base": _difference(scored.get("from_base", {}).get(metric)),
                "from the one before": _difference(scored.get("from_previous", {}).get(metric)),
            }
        )
        if apart := scored_apart(scored):
            values = {"base": _value(first, task, metric, apart=True), "last": _value(last, task, metric, apart=True)}
            rows.append(_NOTHING | {"task": task, "metric": f"{_LABELS[metric]}, {apart[0]}"} | values)
    for task, scored in scored_tasks(last).items():
        if not scored["metrics"]:
            rows.append(_NOTHING | {"task": task, "last": "all items were left out"})
    return rows


def _value(evaluation: Mapping[str, Any], task: str, metric: str, apart: bool = False) -> str:
    """`apart`: without the items that overlap the training text."""
    scored = scored_tasks(evaluation).get(task, {})
    score = (scored.get("without_overlap", {}) if apart else scored).get("metrics", {}).get(metric)
    return as_text(score) if score else "–"


def _difference(score: Score | None) -> str:
    return as_text(score, "+.4f") if score else "–"


def flipped_rows(items: Mapping[str, Sequence[Mapping[str, str]]], most: int = 10) -> list[dict[str, str]]:
    """The first items of each task that were right at one of two checkpoints alone."""
    return [{"task": task, **row} for task, rows in items.items() for row in list(rows)[:most]]
