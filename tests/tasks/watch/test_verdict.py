"""A run goes on unless its job was cancelled or refuses to, after the run began."""

from __future__ import annotations

import json

import pytest

from neox_core.config import RunConfig
from neox_core.errors import TrainingError
from tasks.identity.training import resolve_training
from tasks.jobs.retry import NoAnswer
from tasks.watch.verdict import saved_step, verdict
from tests.tasks.jobs.scripted_executor import ScriptedExecutor


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
