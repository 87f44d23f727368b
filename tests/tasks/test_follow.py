"""What is said of a training job while it is followed."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from neox_core.config import RunConfig
from neox_core.config.train_sections import TrainChange
from tasks.follow import describe, follow, last_step, share_done
from tasks.jobs.executor import Resources
from tasks.jobs.failure import JobFailed
from tasks.jobs.launch import JobPlan, attach_or_submit
from tasks.jobs.registry import register_executor
from tasks.jobs.status import Status
from tests.e2e.runs import Run, write_run
from tests.tasks.jobs.scripted_executor import ScriptedExecutor

STEP = "step 4 of 8, loss 4.571"


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return Run(write_run(tmp_path)).config


def metrics(folder: Path, age: float) -> Path:
    """A file whose last training step was written so many seconds ago."""
    path = folder / "metrics.jsonl"
    row = {"step": 4, "train/loss": 4.571, "train/tokens_per_second": 8192.0 / 60}
    path.write_text(json.dumps(row) + "\n")
    os.utime(path, (time.time() - age,) * 2)
    return path


@pytest.mark.parametrize(
    ("status", "seen", "step", "said"),
    [
        (Status("running"), 600, 1, f"{STEP}, 137 tokens/s, 1 min left"),
        (Status("running"), 900, 605, f"job 7 running, no step for 10 min; {STEP}, 137 tokens/s, 1 min left"),
        (Status("running"), 30, 605, f"job 7 running; last: {STEP}"),
        (Status("running"), 180, 605, f"job 7 running, no step for 3 min; last: {STEP}"),
        (Status("running"), 605, None, "job 7 running, no step for 10 min"),
        (Status("pending", None, "Resources"), 4000, 1, f"job 7 pending (Resources), for 1 h 6 min; last: {STEP}"),
        (None, 600, 1, f"job 7 may be at work: SLURM does not answer; last: {STEP}"),
    ],
)
def test_the_jobs_state_comes_before_the_last_step(
    tmp_path: Path, config: RunConfig, status: Status | None, seen: float, step: float | None, said: str
) -> None:
    file = tmp_path / "none" if step is None else metrics(tmp_path, step)
    # 4 steps of 2,048 tokens at 8,192 tokens a minute: a minute is left.
    assert describe("7", status, time.time() - seen, last_step(file), file, config) == said


def test_the_time_that_is_left_counts_the_batches_to_come(tmp_path: Path, config: RunConfig) -> None:
    file, changes = metrics(tmp_path, 1), (TrainChange(from_step=6, global_batch_tokens=6 * 2048),)
    larger = config.model_copy(update={"train": config.train.model_copy(update={"changes": changes})})
    # A step of 2,048 tokens and three of six times as many.
    assert describe("7", Status("running"), 0, last_step(file), file, larger) == f"{STEP}, 137 tokens/s, 4 min left"


def test_steps_that_are_done_again_are_the_last_ones(tmp_path: Path, config: RunConfig) -> None:
    file = metrics(tmp_path, 1)
    with file.open("a") as rows:
        again = {"step": 2, "train/loss": 4.6, "train/tokens_per_second": 8192.0 / 60}
        rows.write(json.dumps(again) + "\n" + json.dumps({"step": 2, "validation/loss": 4.7}) + "\n")
    assert describe("7", Status("running"), 0, last_step(file), file, config).startswith("step 2 of 8, loss 4.600")
    assert share_done(config, file) == 0.25


def test_a_look_at_the_last_step_reads_no_other_row(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Progress looks each second, for weeks, also while a full disk keeps half a row."""
    file = metrics(tmp_path, 1)
    file.write_text("no row\n" + file.read_text() + '{"step": 5, "train/loss": 4.5, "train/tok')
    assert (last_step(file) or {})["step"] == 4
    assert caplog.text == ""
    with file.open("a") as rows:
        rows.write("\n" + '{"step": 4, "validation/loss": 4.5}\n' * 10_000)
    assert (last_step(file) or {})["step"] == 4
    with file.open("a") as rows:  # as another node sees what is being written over NFS
        rows.write("\0" * 40 + ' "train/loss": 4.5}')
    assert (last_step(file) or {})["step"] == 4


@pytest.mark.parametrize("reason", ["launch failed requeued held", "job_requeued_in_held_state", "JobHoldMaxRequeue"])
def test_a_held_requeue_ends_the_attempt(tmp_path: Path, config: RunConfig, reason: str) -> None:
    scheduler = ScriptedExecutor()
    register_executor("scripted", lambda: scheduler)
    job = attach_or_submit(JobPlan(tmp_path, "train", "k" * 16, [(print, ())], Resources(), "scripted"))
    scheduler.states_by_id["1"] = Status("pending", None, reason)
    with pytest.raises(JobFailed, match="which holds it") as error:
        follow(job, config, tmp_path / "none", lambda share, text: None)
    assert not error.value.final
    assert scheduler.cancelled == ["1"]


def test_a_job_that_a_person_holds_is_left_alone(tmp_path: Path, config: RunConfig) -> None:
    scheduler = ScriptedExecutor()
    register_executor("scripted", lambda: scheduler)
    job = attach_or_submit(JobPlan(tmp_path, "train", "k" * 16, [(print, ())], Resources(), "scripted"))
    scheduler.states_by_id["1"] = Status("pending", None, "JobHeldUser")

    def stop(share: float, text: str) -> None:
        raise KeyboardInterrupt(text)

    with pytest.raises(KeyboardInterrupt, match=r"job 1 pending \(JobHeldUser\), for 0 s"):
        follow(job, config, tmp_path / "none", stop)
    assert scheduler.cancelled == []
