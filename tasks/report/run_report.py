"""Puts the stages' results together: report.html and the table that a run ends with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from neox_core.artifact import software
from neox_core.config import RunConfig
from neox_core.train.observe.metrics import METRICS_FILE
from tasks.evaluation.kept_items import BASE_STEP, load_items, scored_tasks
from tasks.evaluation.show import flipped, is_right
from tasks.identity.stage import StageResult
from tasks.prepare import ledger
from tasks.report.page import REPORT_FILE, ReportData, read_metrics, summary_rows, write_report
from tasks.report.tasks_section import flipped_rows


@dataclass(frozen=True)
class RunReport:
    """Where the report is, and its headlines."""

    path: Path
    rows: list[tuple[str, str]]


def write_run_report(config: RunConfig, results: Sequence[StageResult]) -> RunReport:
    """Write `<workdir>/report.html` from the results of all stages, in their order."""
    prepared, converted, trained, evaluated, exported = results
    path = config.workdir / REPORT_FILE
    data = ReportData(
        title=config.name,
        config=config.model_dump(mode="json"),
        ledger=ledger(config, prepared),
        metrics=read_metrics(trained.artifact.folder / METRICS_FILE),
        evaluations=evaluated.artifact.summary["evaluations"],
        flipped=_flipped(evaluated),
        stages=[
            {"stage": result.artifact.name, "seconds": result.seconds, "skipped": result.skipped} for result in results
        ],
        train=dict(trained.artifact.summary),
        links={
            "model": str(exported.artifact.folder),
            "report": str(path),
            "checkpoints": str(trained.artifact.summary["prefix"]),
            "shards": str(converted.artifact.folder),
        },
        software=software(),
    )
    write_report(path, data)
    return RunReport(path, summary_rows(data))


def _flipped(evaluated: StageResult) -> list[dict[str, str]]:
    """Ten items of each set that are right at one of the base and the last checkpoint alone."""
    last, folder = evaluated.artifact.summary["evaluations"][-1], evaluated.artifact.folder
    items = {}
    for task in scored_tasks(last):
        now, base = load_items(folder, task, last["step"]), load_items(folder, task, BASE_STEP)
        if any(is_right(record) is not None for record in now):
            items[task] = flipped(now, base)
    return flipped_rows(items)
