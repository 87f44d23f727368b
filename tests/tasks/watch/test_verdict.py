"""A run goes on unless its job was cancelled or refuses to, after the run began."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from neox_core.artifact import Artifact
from neox_core.config import RunConfig
from neox_core.errors import TrainingError
from tasks.identity.current import note_current
from tasks.identity.stage import StageResult
from tasks.identity.training import resolve_training
from tasks.jobs.executor import Resources
from tasks.jobs.launch import JobPlan, attach_or_submit
from tasks.jobs.registry import register_executor
from tasks.jobs.retry import NoAnswer
from tasks.watch.verdict import saved_step, verdict
from tests.e2e.runs import Run, copy_text, write_run
from tests.tasks.jobs.scripted_executor import ScriptedExecutor


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    """A run whose first two stages have finished."""
    copy_text(tmp_path)
    config = Run(write_run(tmp_path)).config
    for name, fingerprint in (("prepare-data", "d" * 64), ("convert", "c" * 64)):
        artifact = Artifact(name, fingerprint, {}, config.model_dump(mode="json"), (), {})
        note_current(config, StageResult(artifact, skipped=False))
    return config


@pytest.fixture
def cluster(config: RunConfig) -> ScriptedExecutor:
    """A scheduler with the training's job, 1, which refuses to go on when it runs."""
    scheduler = ScriptedExecutor()
    register_executor("scripted", lambda: scheduler)
    key = resolve_training(config).fingerprint
    attach_or_submit(JobPlan(config.workdir / "jobs", "train", key, [(refuse, ())], Resources(), "scripted"))
    return scheduler


def refuse() -> None:
    raise TrainingError("the loss is not finite")


def test_without_a_job_a_run_goes_on(config: RunConfig) -> None:
    assert verdict(config, 0.0).go_on
    assert verdict(config, 0.0).text == "no job was submitted"


@pytest.mark.parametrize("state", ["pending", "running", "timeout", "failed"])
def test_it_goes_on_with_its_job_or_with_another_one(config: RunConfig, cluster: ScriptedExecutor, state: str) -> None:
    cluster.end(state, "1")
    found = verdict(config, 0.0)
    assert found.go_on
    assert found.text.startswith("job 1 (llemma-train-")
    assert len(cluster.by_name) == 1  # to look submits nothing


def test_a_job_that_was_cancelled_stays_so(config: RunConfig, cluster: ScriptedExecutor) -> None:
    cluster.end("cancelled", "1")
    assert not verdict(config, 0.0).go_on
    assert "was cancelled" in verdict(config, 0.0).text
    assert verdict(config, since=4e9).go_on  # for a run that was begun since


def test_a_training_that_refuses_stays_so(config: RunConfig, cluster: ScriptedExecutor) -> None:
    with pytest.raises(TrainingError):
        cluster.run("1")
    cluster.end("failed", "1")
    found = verdict(config, 0.0)
    assert not found.go_on
    assert "the loss is not finite" in found.text


def test_a_silent_scheduler_is_no_verdict(config: RunConfig, cluster: ScriptedExecutor) -> None:
    cluster.silent = 1
    with pytest.raises(NoAnswer):
        verdict(config, 0.0)


def test_the_step_that_is_saved(config: RunConfig) -> None:
    training = resolve_training(config)
    assert saved_step(None) == saved_step(training) == 0
    training.scratch.mkdir(parents=True)
    rows = [{"step": step, "train/loss": 1.0} for step in range(1, 8)]
    (training.scratch / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    assert saved_step(training) == 4
