"""Where a run is: what each stage has made or is at, for people who look in from another terminal."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from neox_core.artifact import Artifact
from neox_core.config import RunConfig
from neox_core.storage.claims import is_claimed
from neox_core.train.observe.metrics import INCIDENTS_FILE, METRICS_FILE
from neox_core.train.observe.rows import read_rows
from tasks.evaluate import EVALUATIONS_FILE
from tasks.evaluation.jobs import evaluation_jobs
from tasks.follow import describe, last_step
from tasks.identity.current import find_current
from tasks.identity.specs import CONVERT, EVALUATE, PREPARE_DATA, STAGES, TRAIN, evaluate_spec, export_spec
from tasks.identity.stage import StageIdentity, find
from tasks.identity.training import Training, find_training
from tasks.jobs.job import Job
from tasks.jobs.retry import NoAnswer
from tasks.new_training import CONFIG_FILE
from tasks.train import training_jobs


@dataclass(frozen=True)
class StageView:
    """A stage as it is now."""

    stage: str
    state: str
    """finished, at work, failed, cancelled, unfinished or not begun."""
    text: str
    """How far it is, or why it isn't further."""
    place: Path | None = None
    """Where its result or its logs lie."""


def stage_views(config: RunConfig) -> list[StageView]:
    """All stages of a run, in the chain's order.

    Raises:
        LaunchError: a local job belongs to another host.
    """
    training = find_training(config)
    return [_view(config, training, stage) for stage in STAGES]


def begun_runs(workdir: Path) -> list[RunConfig]:
    """The configurations whose trainings were begun in a workdir, the one that was at work last first."""
    found = sorted((workdir / "scratch").glob(f"{TRAIN}-*/{CONFIG_FILE}"), key=_last_work, reverse=True)
    return [RunConfig.model_validate(json.loads(path.read_text(encoding="utf-8"))) for path in found]


def stage_jobs(config: RunConfig, stage: str) -> list[Job]:
    """The jobs of train or evaluate that were submitted, the newest last.

    Raises:
        LaunchError: the scheduler does not answer.
    """
    training = find_training(config)
    if training is None:
        return []
    jobs = training_jobs(training) if stage == TRAIN else evaluation_jobs(evaluate_spec(config, training.fingerprint))
    return sorted(jobs, key=submitted)


def newest_job(training: Training) -> Job | None:
    """The training's job that was submitted last; None if there is none.

    Raises:
        NoAnswer: the scheduler does not answer.
    """
    return max(training_jobs(training), key=submitted, default=None)


def last_incident(scratch: Path) -> str:
    """The last step that was not done, in words; empty if there was none."""
    records = read_rows(scratch / INCIDENTS_FILE)
    if not records:
        return ""
    record = records[-1]
    return f"step {record['step']}: {record['problem']} ({record['action']})"


def _view(config: RunConfig, training: Training | None, stage: str) -> StageView:
    if stage in (PREPARE_DATA, CONVERT):
        return _local_view(config, stage, find_current(config, stage))
    if training is None:
        return StageView(stage, "not begun", f"waits for {PREPARE_DATA} and {CONVERT}")
    if stage == TRAIN:
        return training_view(training)
    if stage == EVALUATE:
        return _evaluation_view(training)
    return _local_view(config, stage, export_spec(config, training.fingerprint).identity)


def _local_view(config: RunConfig, stage: str, identity: StageIdentity | None) -> StageView:
    """Of a stage without a job."""
    if identity and (artifact := find(identity)):
        return StageView(stage, "finished", f"in {artifact.summary['seconds']:,.0f} s", artifact.folder)
    # What prepare-data or convert make is not known by name before they have finished.
    if is_claimed(config.workdir, identity.folder.name if identity else f"{stage}-*"):
        return StageView(stage, "at work", "in another process")
    return StageView(stage, "not begun" if identity is None or not identity.folder.exists() else "unfinished", "")


def training_view(training: Training) -> StageView:
    """The train stage as it is now.

    Raises:
        LaunchError: a local job belongs to another host.
    """
    config, metrics = training.config, training.scratch / METRICS_FILE
    if artifact := find(training.spec.identity):
        text = f"step {artifact.summary['steps']} of {config.train.steps}, loss {artifact.summary['last_loss']:.3f}"
        return StageView(TRAIN, "finished", text, artifact.folder)
    job, row = newest_job(training), last_step(metrics)
    if job is None:
        return StageView(TRAIN, "not begun", "no job was submitted")
    try:
        status = job.status()
    except NoAnswer:
        return StageView(TRAIN, "unknown", describe(job.job_id, None, 0.0, row, metrics, config), training.scratch)
    text = describe(job.job_id, status, submitted(job), row, metrics, config)
    return StageView(TRAIN, "at work" if status.at_work else status.state, text, training.scratch)


def _evaluation_view(training: Training) -> StageView:
    spec = evaluate_spec(training.config, training.fingerprint)
    artifact: Artifact | None = find(spec.identity)
    if artifact:
        steps: Sequence[int] = [result["step"] for result in artifact.summary["evaluations"]]
        return StageView(EVALUATE, "finished", f"{len(steps)} checkpoints, the last of step {steps[-1]}", spec.folder)
    path = spec.folder / EVALUATIONS_FILE
    results = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    text = f"{len(results)} checkpoints so far"
    if is_claimed(training.config.workdir, spec.folder.name):
        return StageView(EVALUATE, "at work", text, spec.folder)
    return StageView(EVALUATE, "unfinished" if results else "not begun", text if results else "", spec.folder)


def submitted(job: Job) -> float:
    """Unix seconds of the last submission, about; later if the job has written into its folder since."""
    folder = job.record.tasks[-1].folder
    return folder.stat().st_mtime if folder.exists() else time.time()


def _last_work(config_file: Path) -> float:
    metrics = config_file.parent / METRICS_FILE
    return (metrics if metrics.is_file() else config_file).stat().st_mtime


def log_files(jobs: Sequence[Job]) -> Iterator[Path]:
    """The logs of the newest job's tasks, by task and rank, as far as they are there."""
    for index in range(len(jobs[-1].record.tasks)):
        yield from (path for path in jobs[-1].log_paths(index) if path.is_file())
