"""What is told of a training."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from neox_core.config import RunConfig
from tasks import train
from tasks.identity.training import resolve_training
from tasks.watch.events import training_events
from tasks.watch.notify import Event
from tests.tasks.jobs.scripted_executor import ScriptedExecutor


def told(config: RunConfig) -> dict[str, Event]:
    return {event.kind: event for event in training_events(config)}


def write(config: RunConfig, name: str, text: str) -> Path:
    path = resolve_training(config).scratch / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def make_older(path: Path, minutes: float) -> None:
    os.utime(path, (time.time() - 60 * minutes,) * 2)


def test_nothing_has_happened(config: RunConfig, cluster: ScriptedExecutor) -> None:
    assert told(config) == {}


def test_the_last_restart_and_the_last_incident_of_this_day(config: RunConfig) -> None:
    write(config, "restart", "job 7 failed: a node failed; submitting it again")
    record = {"step": 3, "problem": "the loss is NaN", "action": "skip"}
    incidents = write(config, "incidents.jsonl", json.dumps(record) + "\n")
    first = told(config)
    assert first["restart"].text == "job 7 failed: a node failed; submitting it again"
    assert first["incident"].text == "step 3: the loss is NaN (skip)"
    assert told(config) == first
    write(config, "restart", "job 8 failed: a node failed; submitting it again")
    assert told(config)["restart"].key != first["restart"].key
    assert told(config)["incident"].key == first["incident"].key
    make_older(incidents, 2000)
    assert set(told(config)) == {"restart"}


def test_half_an_incident_of_a_run_that_was_killed_is_none(config: RunConfig, tmp_path: Path) -> None:
    whole = {"step": 3, "problem": "spike", "action": "skip", "loss": 9.5, "gradient_norm": 2.0, "ranks": [0]}
    incidents = write(config, "incidents.jsonl", '{"step": 3, "problem": "sp')
    assert told(config) == {}
    assert train._incidents(incidents) == []
    incidents.write_text(json.dumps(whole | {"sources": {"code": 2}, "documents": []}) + '\n{"step": 5, "pro')
    assert told(config)["incident"].text == "step 3: spike (skip)"
    assert train._incidents(incidents) == [whole | {"sources": {"code": 2}}]
    assert train._incidents(tmp_path / "absent") == []


def test_a_job_at_work_without_a_step(config: RunConfig, cluster: ScriptedExecutor) -> None:
    metrics = write(config, "metrics.jsonl", json.dumps({"step": 3, "train/loss": 4.5}) + "\n")
    make_older(metrics, 45)
    assert told(config) == {}  # the job was submitted just now
    make_older(next(config.workdir.glob("jobs/*/attempt-0001")), 40)
    event = told(config)["no-step"]
    assert "job 1 pending, for 40 min; last: step 3 of 8" in event.text
    assert told(config)["no-step"].key == event.key
    longer = config.model_copy(update={"notify": config.notify.model_copy(update={"no_step_minutes": 50})})
    assert told(longer) == {}
    cluster.end("failed", "1")
    assert told(config) == {}
