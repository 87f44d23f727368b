"""Cancel ends a run's jobs, and only those."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cloudpickle
import pytest

from flows.flow_runs.cancellation import cancel_jobs_of_run
from neox_core.artifact import Artifact
from neox_core.config import RunConfig
from neox_core.errors import LaunchError
from neox_core.storage.claims import try_claim_name
from tasks.cancel import cancel_jobs
from tasks.evaluation.jobs import _key_prefix
from tasks.identity.current import note_current
from tasks.identity.specs import evaluate_spec
from tasks.identity.stage import StageResult, StageSpec, try_claim
from tasks.identity.training import resolve_training
from tasks.jobs.executor import Resources
from tasks.jobs.job import Job
from tasks.jobs.launch import JobPlan, attach_or_submit, submit_or_attach
from tasks.jobs.record import JobRecord
from tasks.jobs.registry import register_executor
from tasks.prepare import PARTS_CLAIM
from tasks.tokenization.array import jobs_folder
from tests.e2e.runs import Run, copy_text, write_run
from tests.tasks.jobs.scripted_executor import ScriptedExecutor

sys.path.insert(0, str(Path(__file__).parent / "jobs"))
import rank_functions


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunConfig]:
    """A small run's configuration; no job of it outlives its test."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    cloudpickle.register_pickle_by_value(rank_functions)
    copy_text(tmp_path)
    config = Run(write_run(tmp_path)).config
    note_finished(config)
    yield config
    cloudpickle.unregister_pickle_by_value(rank_functions)
    for job in submitted:
        job.cancel()
    submitted.clear()


submitted: list[Job] = []


def note_finished(config: RunConfig, text: str = "d") -> None:
    """As if prepare-data and convert had been run; `text` tells what they made of it."""
    for name, fingerprint in (("prepare-data", text * 64), ("convert", "c" * 64)):
        artifact = Artifact(name, fingerprint, {}, config.model_dump(mode="json"), (), {})
        note_current(config, StageResult(artifact, skipped=False))


def training_spec(config: RunConfig) -> StageSpec:
    return resolve_training(config).spec


def evaluation_spec(config: RunConfig) -> StageSpec:
    return evaluate_spec(config, resolve_training(config).fingerprint)


def submit(config: RunConfig, name: str, key: str) -> Job:
    """A job that would sleep for an hour."""
    args = (str(config.workdir),)
    function, folder = rank_functions.sleep_for_ever, config.workdir / "jobs"
    submitted.append(submit_or_attach(config.launch, folder, name, key, function, args, 1, 2))
    return submitted[-1]


def submit_all(config: RunConfig) -> list[Job]:
    """A run's training and evaluation."""
    return [
        submit(config, "train", training_spec(config).fingerprint),
        submit(config, "evaluate", _key_prefix(evaluation_spec(config)) + "0" * 56),
    ]


def states(jobs: list[Job]) -> list[str]:
    return [job.state() for job in jobs]


def test_a_runs_jobs_are_cancelled_and_nobody_elses(config: RunConfig) -> None:
    jobs = submit_all(config)
    other = submit(config, "train", training_spec(config.model_copy(update={"seed": 7})).fingerprint)
    assert sorted(job.job_id for job in cancel_jobs(config)) == sorted(job.job_id for job in jobs)
    assert states(jobs) == ["cancelled", "cancelled"]
    assert other.state() == "running"
    assert cancel_jobs(config) == []


def test_a_training_on_a_text_that_was_changed_since_is_cancelled_too(config: RunConfig) -> None:
    jobs = submit_all(config)
    for text in ("e", "f", "e"):
        note_finished(config, text)
    assert sorted(job.job_id for job in cancel_jobs(config)) == sorted(job.job_id for job in jobs)
    assert states(jobs) == ["cancelled", "cancelled"]


@pytest.mark.parametrize(
    ("spec_of", "expected"),
    [(training_spec, ["running", "cancelled"]), (evaluation_spec, ["cancelled", "running"])],
    ids=["train", "evaluate"],
)
def test_what_another_run_follows_goes_on(config: RunConfig, spec_of: Any, expected: list[str]) -> None:
    jobs = submit_all(config)
    spec: StageSpec = spec_of(config)
    with try_claim(spec):
        cancel_jobs(config)
    assert states(jobs) == expected


def test_a_job_whose_submitter_died_before_it_noted_it_down_is_found(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(JobRecord, "with_ids", kill)
        with pytest.raises(KeyboardInterrupt):
            submit(config, "train", training_spec(config).fingerprint)
    (job,) = cancel_jobs(config)
    assert job.state() == "cancelled"
    assert cancel_jobs(config) == []


def test_the_hook_cancels_the_jobs_of_the_flow_runs_config(config: RunConfig, tmp_path: Path) -> None:
    jobs = submit_all(config)
    flow_run = SimpleNamespace(parameters={"config": str(tmp_path / "run.yml")})
    cancel_jobs_of_run(None, flow_run, None)  # type: ignore[arg-type]
    assert states(jobs) == ["cancelled", "cancelled"]


@pytest.fixture
def array(config: RunConfig) -> ScriptedExecutor:
    """A tokenization array, 1, of which one task has returned and one runs."""
    scheduler = ScriptedExecutor()
    register_executor("scripted", lambda: scheduler)
    submit_array(config, "key")
    scheduler.run("1_0")
    scheduler.end("running", "1_1")
    return scheduler


def submit_array(config: RunConfig, key: str) -> None:
    calls = [(os.getpid, ())] * 3
    attach_or_submit(JobPlan(jobs_folder(config.workdir), "tokenize", key, calls, Resources(), "scripted"))


def test_tokenization_arrays_are_cancelled(config: RunConfig, array: ScriptedExecutor) -> None:
    with try_claim_name(config.workdir, PARTS_CLAIM):
        assert cancel_jobs(config) == []
    assert array.cancelled == []
    (job,) = cancel_jobs(config)
    assert str(job).startswith("job array 1 (llemma-tokenize-key-")
    assert array.cancelled == ["1_1", "1_2"]
    assert [status.state for status in job.statuses()] != ["completed"] * 3
    assert job.state() == "cancelled"
    assert cancel_jobs(config) == []


def test_what_the_scheduler_does_not_answer_about_does_not_keep_other_jobs(
    config: RunConfig, array: ScriptedExecutor
) -> None:
    array.silent = 99
    jobs = submit_all(config)
    with pytest.raises(LaunchError, match=r"only \['job .*evaluate-.*\)'\]: the scheduler does not answer"):
        cancel_jobs(config)
    assert states(jobs) == ["cancelled", "cancelled"]


def test_a_tokenization_array_whose_submitter_was_killed_is_cancelled(
    config: RunConfig, array: ScriptedExecutor
) -> None:
    array.end("failed", "1_0", "1_1", "1_2")

    def kill(ids: list[str]) -> None:
        raise KeyboardInterrupt

    array.on_submit = kill
    with pytest.raises(KeyboardInterrupt):
        submit_array(config, "other")
    assert [job.job_id for job in cancel_jobs(config)] == ["2"]
    assert array.cancelled == ["2_0", "2_1", "2_2"]


def test_a_run_that_never_submitted_a_job_has_nothing_to_cancel(config: RunConfig) -> None:
    assert cancel_jobs(config) == []
    shutil.rmtree(config.workdir / ".current")
    assert cancel_jobs(config) == []


def test_jobs_are_found_when_the_raw_text_is_gone(config: RunConfig) -> None:
    jobs = submit_all(config)
    shutil.rmtree(config.data.input)
    assert {job.job_id for job in cancel_jobs(config)} == {job.job_id for job in jobs}
