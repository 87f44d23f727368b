"""W&B's runs of a training: one through all its jobs, and one of its evaluation, uploaded by W&B's own command."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from neox_core.config import RunConfig, WandbConfig
from neox_core.errors import ConfigError, LlemmaError
from neox_core.train.observe.wandb_run import WandbRun, offline_folders, start_wandb
from tasks.evaluation.score_log import ScoreLog, score_run
from tasks.identity.specs import evaluate_spec
from tasks.identity.training import Training, resolve_training
from tasks.report import wandb_runs
from tasks.report.wandb_runs import upload_runs, wandb_links
from tests.e2e.runs import Run, write_run
from tests.flows.cli.command import run_command
from tests.tasks.test_cancel import note_finished
from tests.wandb_server import wandb_server

KEY = "0123456789" * 4
"""As W&B's keys look."""


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return Run(write_run(tmp_path, {"wandb": {"mode": "offline"}})).config


@pytest.fixture
def training(config: RunConfig) -> Training:
    """Two jobs of a training, and its evaluation, seem to have written offline."""
    note_finished(config)
    training = resolve_training(config)
    for number, run in enumerate((_training_run(training), _training_run(training), _score_run(training))):
        (training.scratch / "wandb" / f"offline-run-20261128_00000{number}-{run.id}").mkdir(parents=True)
    return training


@pytest.fixture
def written(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> Training:
    """They really have."""
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    note_finished(config)
    training = resolve_training(config)
    training.scratch.mkdir(parents=True)
    for job in range(2):
        time.sleep(1.1 * job)  # W&B tells a run's folders apart by the second
        run = start_wandb(config, training.scratch, _training_run(training))
        for step in range(3 * job + 1, 3 * job + 4):
            run.log({"step": step, "train/loss": 1 / step})
        run.finish()
    with ScoreLog(config, training.scratch, _score_run(training)) as log:
        log.log({"step": 3, "sources": {"arxiv": {"perplexity": 9.5, "bits_per_byte": 0.8}}, "tasks": {}})
    return training


def _training_run(training: Training) -> WandbRun:
    return WandbRun(training.fingerprint, "train", training.fingerprint)


def _score_run(training: Training) -> WandbRun:
    return score_run(evaluate_spec(training.config, training.fingerprint).fingerprint, training.fingerprint)


def test_all_jobs_become_one_run_and_no_page_or_file_has_the_key(
    written: Training, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    training = written
    folder = str(training.scratch / "wandb")
    assert wandb_links(training) == {"W&B: train, 2 not uploaded": folder, "W&B: evaluate, 1 not uploaded": folder}
    with wandb_server() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        assert upload_runs(training) == 3
        assert upload_runs(training) == 0
        trained, scored = server.rows[_training_run(training).id], server.rows[_score_run(training).id]
        described = server.described
    assert [row["step"] for row in trained] == [1, 2, 3, 4, 5, 6]
    assert [(row["step"], row["arxiv/perplexity"]) for row in scored] == [(3, 9.5)]
    group = training.fingerprint[:16]
    assert described == {_training_run(training).id: (group, "train"), _score_run(training).id: (group, "evaluate")}
    assert wandb_links(training) == {}
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 10
    assert [path for path in files if KEY.encode() in path.read_bytes()] == []


MARKS = "import pathlib, sys; [pathlib.Path(folder, 'run.wandb.synced').touch() for folder in sys.argv[2:]]"
"""Stands for a `wandb sync` that succeeds."""


def test_what_a_job_still_writes_is_left_for_later(training: Training, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [(_training_run(training), True), (_score_run(training), True)]
    monkeypatch.setattr(wandb_runs, "_runs", lambda training: iter(runs))
    monkeypatch.setattr(wandb_runs, "_WANDB", (sys.executable, "-c", MARKS))
    assert upload_runs(training) == 1
    assert list(wandb_links(training)) == ["W&B: train, 1 not uploaded", "W&B: evaluate, 1 not uploaded"]
    last = max((training.scratch / "wandb").glob(f"offline-run-*-{_training_run(training).id}"))
    assert list(offline_folders(training.scratch, _training_run(training))) == [last]


def test_a_command_that_uploads_nothing_is_no_success(training: Training, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wandb_runs, "_WANDB", ("true",))
    with pytest.raises(LlemmaError, match=r"3 of 3 runs were not uploaded, such as .*WANDB_API_KEY"):
        upload_runs(training)


def test_the_address_of_a_run_that_is_online_is_kept(training: Training) -> None:
    run = _training_run(training)
    (training.scratch / "wandb" / f"{run.id}.url").write_text("https://wandb.example/lab/runs/1")
    assert wandb_links(training)["W&B: train"] == "https://wandb.example/lab/runs/1"


def test_before_the_training_there_is_nothing_to_upload(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, error = run_command(monkeypatch, capsys, "wandb", "sync", str(tmp_path / "run.yml"))
    assert (status, "there is nothing to upload" in error) == (1, True)


def test_a_key_has_no_place_in_a_configuration(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="api_key"):
        Run(write_run(tmp_path, {"wandb": {"api_key": KEY}})).config.model_dump()
    assert "api_key" not in WandbConfig.model_fields
