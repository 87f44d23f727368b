"""What there is to tell of a training, by what its job has written and the scheduler says."""

from __future__ import annotations

import time
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

from neox_core.config import RunConfig
from neox_core.train.observe.metrics import INCIDENTS_FILE, METRICS_FILE
from tasks.follow import last_step
from tasks.identity.training import Training, find_training
from tasks.overview import last_incident, newest_job, submitted, training_view
from tasks.train import RESTART_FILE
from tasks.watch.notify import Event

_RECENT_SECONDS = 86400.0
"""What is older was told, or nobody wanted to know."""


def training_events(config: RunConfig) -> Iterator[Event]:
    """The training's last restart and incident, and its silence.

    Raises:
        NoAnswer: the scheduler does not answer.
        LaunchError: a local job belongs to another host.
    """
    training = find_training(config)
    if training is None:
        return
    name, scratch = training.fingerprint[:12], training.scratch
    if _is_recent(scratch / RESTART_FILE):
        text = (scratch / RESTART_FILE).read_text(encoding="utf-8")
        yield Event("restart", f"restart {_digest(name + text)}", text, "nothing, unless it happens again")
    if _is_recent(scratch / INCIDENTS_FILE) and (text := last_incident(scratch)):
        yield Event(
            "incident",
            f"incident {_digest(name + text)}",
            text,
            "look at the loss; `train.guard` says what is done about such steps",
        )
    yield from _silence(training)


def _silence(training: Training) -> Iterator[Event]:
    config, metrics = training.config, training.scratch / METRICS_FILE
    job = newest_job(training)
    view = training_view(training)
    if job is None or view.state != "at work":
        return
    row = last_step(metrics)
    last_sign = max(submitted(job), metrics.stat().st_mtime if row else 0.0)
    if time.time() - last_sign >= 60 * config.notify.no_step_minutes:
        key = f"no-step {training.fingerprint[:12]} {job.job_id} {row['step'] if row else 0}"
        todo = f"`llemma logs`, or the queue; a hang ends the job after {config.launch.hang_timeout_minutes:g} min"
        yield Event("no-step", key, view.text, todo)


def _is_recent(path: Path) -> bool:
    return path.is_file() and time.time() - path.stat().st_mtime < _RECENT_SECONDS


def _digest(text: str) -> str:
    return sha256(text.encode()).hexdigest()[:16]
