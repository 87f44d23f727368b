"""Puts the stages' results together: report.html and the table that a run ends with. Also of a run that goes on."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neox_core.artifact import ARTIFACT_FILE, software
from neox_core.errors import LlemmaError, StorageError
from neox_core.progress import Progress
from neox_core.train.observe.metrics import METRICS_FILE
from neox_core.train.observe.rows import read_metrics, training_figures
from tasks.evaluate import EVALUATIONS_FILE
from tasks.evaluation.kept_items import BASE_STEP, load_items, scored_tasks
from tasks.evaluation.show import flipped, is_right
from tasks.identity.specs import CONVERT, EVALUATE, EXPORT, PREPARE_DATA, TRAIN, evaluate_spec, export_spec
from tasks.identity.stage import StageResult, find
from tasks.identity.training import Training
from tasks.prepare import ledger
from tasks.report.page import ReportData, summary_rows, write_report
from tasks.report.places import REPORT_FILE, places, report_key
from tasks.report.tasks_section import flipped_rows

logger = logging.getLogger(__name__)

_FIRST_SECONDS, _LAST_SECONDS = 20.0, 600.0
"""Between renewals of the report: a tenth of the time that it goes on, within these bounds."""


@dataclass(frozen=True)
class RunReport:
    """Where the report is, and its headlines."""

    path: Path
    rows: list[tuple[str, str]]


def write_run_report(training: Training, results: Mapping[str, StageResult] | None = None) -> RunReport:
    """Write `<workdir>/report.html` and copy it to the store, next to the checkpoints. What is not finished yet is
    shown as far as it is.

    Args:
        results: by stage; None: of the stages that are finished.
    """
    path = training.config.workdir / REPORT_FILE
    data = _gathered(training, _finished(training) if results is None else results)
    write_report(path, data)
    try:
        training.store.put_bytes(report_key(training), path.read_bytes())
    except StorageError as error:
        logger.warning("the report is not in the store: %s", error)
    return RunReport(path, summary_rows(data))


def renewing(training: Training, progress: Progress) -> Progress:
    """The progress of a stage that also renews the report, from the first step on."""
    begun, due = time.monotonic(), 0.0

    def report(share: float, text: str) -> None:
        nonlocal due
        progress(share, text)
        if time.monotonic() >= due and (training.scratch / METRICS_FILE).is_file():
            try:
                write_run_report(training)
            except (LlemmaError, OSError) as error:  # worth a warning, not a run of weeks
                logger.warning("the report is not renewed: %s", error)
            pause = max(_FIRST_SECONDS, min(_LAST_SECONDS, (time.monotonic() - begun) / 10))
            due = time.monotonic() + pause

    return report


def _finished(training: Training) -> dict[str, StageResult]:
    identities = {
        PREPARE_DATA: training.data,
        CONVERT: training.weights,
        TRAIN: training.spec.identity,
        EVALUATE: evaluate_spec(training.config, training.fingerprint).identity,
        EXPORT: export_spec(training.config, training.fingerprint).identity,
    }
    found = {name: find(identity) for name, identity in identities.items()}
    return {name: StageResult(artifact, skipped=False) for name, artifact in found.items() if artifact}


def _gathered(training: Training, results: Mapping[str, StageResult]) -> ReportData:
    config = training.config
    trained, evaluated = results.get(TRAIN), results.get(EVALUATE)
    metrics = read_metrics((trained.artifact.folder if trained else training.scratch) / METRICS_FILE)
    links = {"model": str(results[EXPORT].artifact.folder)} if EXPORT in results else {}
    if CONVERT in results:
        links["shards"] = str(results[CONVERT].artifact.folder)
    addresses = {}
    for place in places(training):
        links[place.what] = place.where
        if place.address:
            addresses[place.what] = place.address
    return ReportData(
        title=config.name,
        config=config.model_dump(mode="json"),
        ledger=ledger(config, results[PREPARE_DATA]) if PREPARE_DATA in results else {},
        metrics=metrics,
        evaluations=_evaluations(training, evaluated),
        flipped=_flipped(evaluated) if evaluated else [],
        stages=[_stage(result) for result in results.values()],
        train=dict(trained.artifact.summary) if trained else training_figures(metrics),
        links=links,
        addresses=addresses,
        software=software(),
    )


def _evaluations(training: Training, evaluated: StageResult | None) -> list[dict[str, Any]]:
    if evaluated:
        found: list[dict[str, Any]] = evaluated.artifact.summary["evaluations"]
        return found
    path = evaluate_spec(training.config, training.fingerprint).folder / EVALUATIONS_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []


def _stage(result: StageResult) -> dict[str, Any]:
    path = result.artifact.folder / ARTIFACT_FILE
    ended = path.stat().st_mtime if path.is_file() else None
    return {"stage": result.artifact.name, "seconds": result.seconds, "skipped": result.skipped, "ended": ended}


def _flipped(evaluated: StageResult) -> list[dict[str, str]]:
    """Ten items of each set that are right at one of the base and the last checkpoint alone."""
    last, folder = evaluated.artifact.summary["evaluations"][-1], evaluated.artifact.folder
    items = {}
    for task in scored_tasks(last):
        now, base = load_items(folder, task, last["step"]), load_items(folder, task, BASE_STEP)
        if any(is_right(record) is not None for record in now):
            items[task] = flipped(now, base)
    return flipped_rows(items)
