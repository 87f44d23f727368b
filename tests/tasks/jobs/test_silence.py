"""Training and evaluation go on while SLURM is silent; nothing is trained here."""

from __future__ import annotations

import errno
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from submitit.core.utils import cloudpickle_dump

from neox_core.artifact import Artifact
from neox_core.errors import ConfigError, LaunchError
from neox_core.progress import Progress, silent
from tasks import evaluate, train
from tasks.evaluation import jobs
from tasks.identity.current import note_current
from tasks.identity.specs import evaluate_spec
from tasks.identity.stage import StageResult
from tasks.identity.training import Training, resolve_training
from tasks.jobs.rank_record import result_file
from tasks.jobs.retry import SchedulerRetry
from tests.e2e.runs import Run, copy_text, write_run
from tests.full_disk import Disk, put_on_disk
from tests.tasks.jobs.slurm.fake_slurm import FakeSlurm

SILENT = "job 42 may be at work: SLURM does not answer"


@pytest.fixture
def training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Training:
    """A small run's, whose earlier stages and checkpoints are taken for there."""
    copy_text(tmp_path)
    artifact = SimpleNamespace(folder=tmp_path, summary={"sources": {}})
    for module in (train, evaluate, jobs):
        monkeypatch.setattr(module, "require", lambda spec: artifact)
    monkeypatch.setattr(train, "_is_complete", lambda training: True)
    monkeypatch.setattr(train, "_summary", lambda training, folder, result: result)
    monkeypatch.setattr("tasks.follow._POLL_SECONDS", 0.0)
    config = Run(write_run(tmp_path, {"launch": {"executor": "slurm", "ranks_per_node": 1}})).config
    for name in ("prepare-data", "convert"):
        made = Artifact(name, "f" * 64, {}, config.model_dump(mode="json"), (), {})
        note_current(config, StageResult(made, skipped=False))
    return resolve_training(config)


def complete(training: Training, fake_slurm: FakeSlurm, result: Any) -> None:
    """The job ends well."""
    (attempt,) = training.config.workdir.glob("jobs/*/attempt-0001")
    for rank in range(training.config.parallel.tensor):
        cloudpickle_dump(result, result_file(attempt, 0, rank))
    fake_slurm.sacct("COMPLETED")


def test_train_goes_on_while_slurm_is_silent(training: Training, fake_slurm: FakeSlurm) -> None:
    seen: list[str] = []

    def interrupt(share: float, text: str) -> None:
        seen.append(text)
        if len(seen) == 3:
            raise KeyboardInterrupt

    fake_slurm.squeue("RUNNING")
    fake_slurm.be_silent("squeue", 2)
    with pytest.raises(KeyboardInterrupt):
        train.train(training, interrupt)
    assert seen == [SILENT, SILENT, "job 42 running"]

    def end_in_a_silence(share: float, text: str) -> None:
        seen.append(text)
        if len(seen) == 3:
            complete(training, fake_slurm, {"done": True})
            fake_slurm.be_silent("sacct", 99)  # the results say enough

    seen.clear()
    fake_slurm.be_silent("squeue", 2)  # a later run attaches when it has an answer
    assert train.train(training, end_in_a_silence).artifact.summary["done"]
    assert seen == ["waiting for SLURM, which does not answer"] * 2 + ["job 42 running"]
    assert (fake_slurm.folder / "submissions").read_text() == "x\n"
    assert not (training.scratch / train.FAILURE_FILE).exists()


def test_evaluate_goes_on_while_slurm_is_silent(training: Training, fake_slurm: FakeSlurm) -> None:
    reports: list[int] = []

    def report(text: str = "", /) -> None:
        reports.append(1)
        if len(reports) == 4:
            complete(training, fake_slurm, [{"step": 0}])

    fake_slurm.squeue("RUNNING")
    fake_slurm.be_silent("squeue", 3)
    spec = evaluate_spec(training.config, training.fingerprint)
    assert jobs.evaluate_steps(spec, training, "p", [0], report) == [{"step": 0}]
    assert len(reports) == 4


def test_silence_is_no_failed_training(training: Training, fake_slurm: FakeSlurm) -> None:
    """As seen by the evaluation that waits for its checkpoints."""

    def interrupt(share: float, text: str) -> None:
        raise KeyboardInterrupt

    fake_slurm.squeue("RUNNING")
    with pytest.raises(KeyboardInterrupt):
        train.train(training, interrupt)
    (training.scratch / train.FAILURE_FILE).unlink()
    retry_policy = SchedulerRetry()
    fake_slurm.sacct("FAILED")
    fake_slurm.be_silent("sacct", 1)
    assert [evaluate._training_failed(training, 0.0, retry_policy) for _ in range(2)] == [False, True]


def test_a_full_disk_hides_no_failure_and_is_one_in_words(training: Training, monkeypatch: pytest.MonkeyPatch) -> None:
    put_on_disk(monkeypatch, lambda opened: ".failed." in opened.name, lambda: Disk(0))
    failure: Exception = LaunchError("job 42 failed")

    def fail(training: Training, progress: Progress) -> StageResult:
        raise failure

    monkeypatch.setattr(train, "_train", fail)
    with pytest.raises(LaunchError, match="job 42 failed"):
        train.train(training, silent)
    failure = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(ConfigError, match=r"the disk of \S+ is full: .*give the same command again"):
        train.train(training, silent)
    assert not (training.scratch / train.FAILURE_FILE).exists()
