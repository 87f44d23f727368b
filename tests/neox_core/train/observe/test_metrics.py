"""The metrics file, its copy in the store, and Weights & Biases."""

from __future__ import annotations

import errno
import json
import math
import re
import socket
import time
import types
from pathlib import Path
from typing import Any, Literal

import pytest

from neox_core.checkpoint.retention import superseded
from neox_core.config import CheckpointsConfig, RunConfig, WandbConfig, load_config
from neox_core.storage.object_store import ObjectStore
from neox_core.train.observe import metrics, wandb_run
from neox_core.train.observe.metrics import METRICS_FILE, MetricsLog, validation_losses
from neox_core.train.observe.rows import read_metrics
from tests.paths import CONFIGS
from tests.wandb_server import wandb_server

Mode = Literal["disabled", "offline", "online"]
RUN_ID = "0123456789abcdef0123456789abcdef"


def config(mode: Mode = "disabled") -> RunConfig:
    toy = load_config(CONFIGS / "toy.yml")
    return toy.model_copy(update={"wandb": WandbConfig(mode=mode)})


def open_log(folder: Path, store: ObjectStore, rank: int = 0, mode: Mode = "disabled") -> Any:
    return MetricsLog(config(mode), folder, store, "train-0123", RUN_ID, rank)


def test_rows(store: ObjectStore, tmp_path: Path) -> None:
    before = time.time()
    with open_log(tmp_path / "new", store) as log:
        log.log(1, train__loss=2.5, train__lr=1e-4)
        log.log(1, validation__loss=3.25)
        # Each row can be read at once, by a flow that watches.
        rows = [json.loads(line) for line in (tmp_path / "new" / METRICS_FILE).read_text().splitlines()]
    assert [before <= row.pop("time") <= time.time() for row in rows] == [True, True]
    assert rows == [{"step": 1, "train/loss": 2.5, "train/lr": 1e-4}, {"step": 1, "validation/loss": 3.25}]


def test_a_resumed_run_goes_on_and_its_rows_win(store: ObjectStore, tmp_path: Path) -> None:
    with open_log(tmp_path, store) as log:
        log.log(1, train__loss=3.0)
        log.log(2, train__loss=2.0)
    with open_log(tmp_path, store) as log:
        log.log(2, train__loss=2.5)
        log.log(3, train__loss=1.0)
    assert [row["train/loss"] for row in read_metrics(tmp_path / METRICS_FILE)] == [3.0, 2.5, 1.0]


def test_a_job_that_lost_its_training_writes_no_more(store: ObjectStore, tmp_path: Path) -> None:
    with open_log(tmp_path, store) as lost, open_log(tmp_path, store) as log:
        log.log(1, train__loss=2.0)
        lost.log(1, train__loss=3.0)
        lost.backup()()
        assert store.get_text(f"train-0123/{METRICS_FILE}") is None
    assert [row["train/loss"] for row in read_metrics(tmp_path / METRICS_FILE)] == [2.0]


def test_half_a_row_of_a_killed_run_is_removed(
    store: ObjectStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with open_log(tmp_path, store) as log:
        log.log(1, train__loss=3.0)
    path = tmp_path / METRICS_FILE
    path.write_text(path.read_text() + '{"step": 2, "train/lo')
    with open_log(tmp_path, store) as log:
        log.log(2, train__loss=2.0)
    assert [row["train/loss"] for row in read_metrics(path)] == [3.0, 2.0]
    assert '{"step": 2, "train/lo' in caplog.text


def test_what_was_backed_up_comes_back_when_the_folder_is_lost(store: ObjectStore, tmp_path: Path) -> None:
    with open_log(tmp_path / "first", store) as log:
        log.log(1, train__loss=3.0)
        log.backup()()
        log.log(2, train__loss=2.0)
    assert store.get_text(f"train-0123/{METRICS_FILE}") == "".join(
        line for line in (tmp_path / "first" / METRICS_FILE).open() if '"step": 1' in line
    )
    with open_log(tmp_path / "second", store) as log:
        log.log(2, train__loss=2.5)
    assert [row["train/loss"] for row in read_metrics(tmp_path / "second" / METRICS_FILE)] == [3.0, 2.5]


def test_a_file_that_is_there_is_not_replaced_by_the_backup(store: ObjectStore, tmp_path: Path) -> None:
    with open_log(tmp_path, store) as log:
        log.backup()()  # of no rows
        log.log(1, train__loss=3.0)
    with open_log(tmp_path, store):
        pass
    assert len(read_metrics(tmp_path / METRICS_FILE)) == 1


def test_a_folder_that_another_one_went_on_from_has_the_rows_of_both(store: ObjectStore, tmp_path: Path) -> None:
    for step, folder in enumerate(("first", "second", "first")):
        with open_log(tmp_path / folder, store) as log:
            log.log(step, train__loss=3.0)
            log.backup()()
    assert [row["step"] for row in read_metrics(tmp_path / "first" / METRICS_FILE)] == [0, 1, 2]


def test_a_validation_loss_that_is_no_number_is_the_worst(tmp_path: Path) -> None:
    """Among others it had sorted anyhow, and the best checkpoint was removed."""
    losses = {5: math.nan, 10: 2.0, 15: 3.0}
    rows = [json.dumps({"step": step, "validation/loss": loss}) + "\n" for step, loss in losses.items()]
    (tmp_path / METRICS_FILE).write_text("".join(rows))
    found = validation_losses(tmp_path / METRICS_FILE)
    assert found == {5: math.inf, 10: 2.0, 15: 3.0}
    assert superseded([5, 10, 15, 20], CheckpointsConfig(keep_last=1, keep_best=1), found) == [5, 15]


def test_other_ranks_are_silent(store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "start_wandb", lambda *args: pytest.fail("W&B was started"))
    with open_log(tmp_path / "new", store, rank=1, mode="offline") as log:
        log.log(1, train__loss=3.0)
        log.backup()()
    assert not (tmp_path / "new").exists()
    assert store.list() == []


def test_disabled_wandb_is_not_started(store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "start_wandb", lambda *args: pytest.fail("W&B was started"))
    with open_log(tmp_path, store) as log:
        log.log(1, train__loss=3.0)
    assert {path.name for path in tmp_path.iterdir()} == {METRICS_FILE, "metrics.writer"}


class FakeRun:
    def __init__(self) -> None:
        self.calls: list[Any] = []

    def log(self, row: dict[str, float]) -> None:
        self.calls.append(row)

    def finish(self, exit_code: int) -> None:
        self.calls.append(exit_code)


def test_wandb_gets_the_rows_and_hears_of_failure(
    store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = FakeRun()
    monkeypatch.setattr(metrics, "start_wandb", lambda *args: run)

    def fail() -> None:
        with open_log(tmp_path, store, mode="offline") as log:
            log.log(7, train__loss=3.0)
            raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        fail()
    with open_log(tmp_path, store, mode="offline"):
        pass
    assert run.calls == [{"step": 7, "train/loss": 3.0}, 1, 0]


def test_wandb_offline_writes_a_run_named_by_the_fingerprint(store: ObjectStore, tmp_path: Path) -> None:
    with open_log(tmp_path, store, mode="offline") as log:
        log.log(1, train__loss=3.0)
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    assert folder.name.endswith(f"-{RUN_ID[:16]}")
    assert [path.name for path in folder.glob("*.wandb")] == [f"run-{RUN_ID[:16]}.wandb"]


def test_without_a_network_wandb_writes_offline(
    store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # nobody listens
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{unused.getsockname()[1]}")
        monkeypatch.delenv("http_proxy", raising=False)
        for step in (1, 2):  # a job and its successor
            with open_log(tmp_path, store, mode="online") as log:
                log.log(step, train__loss=3.0)
    folders = list((tmp_path / "wandb").glob("offline-run-*"))
    assert len(folders) == 2
    assert all(RUN_ID[:16] in folder.name for folder in folders)
    assert "W&B cannot be reached" in caplog.text
    assert "wandb sync" in caplog.text


class LostRun:
    """A run whose process was killed."""

    summary: Any = types.MappingProxyType({})

    def log(self, row: dict[str, float]) -> None:
        raise ConnectionResetError("Connection lost")

    def finish(self, exit_code: int) -> None:
        raise ConnectionResetError("Connection lost")


def test_a_wandb_process_that_dies_ends_no_training(
    store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(wandb_run, "_init", lambda *args: LostRun())
    with open_log(tmp_path, store, mode="offline") as log:
        for step in (1, 2, 3):
            log.log(step, train__loss=3.0)
            log.note("incident", "a spike")
    with open_log(tmp_path, store, mode="offline") as log:
        log.note("incident", "a spike")
    with open_log(tmp_path, store, mode="offline"):
        pass
    assert [row["step"] for row in read_metrics(tmp_path / METRICS_FILE)] == [1, 2, 3]
    assert caplog.text.count("W&B has failed, and is told nothing more by this job: ") == 3


def test_where_wandb_cannot_even_begin_the_training_goes_on(
    store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(wandb_run, "_init", full)
    with open_log(tmp_path, store, mode="offline") as log:
        log.log(1, train__loss=3.0)
    assert [row["step"] for row in read_metrics(tmp_path / METRICS_FILE)] == [1]
    assert "OSError: [Errno 28] No space left on device" in caplog.text


@pytest.mark.parametrize("key", [None, "too short"])
def test_where_wandb_refuses_a_job_writes_offline(
    key: str | None,
    store: ObjectStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))  # which has no key
    monkeypatch.delenv("NETRC", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    if key:
        monkeypatch.setenv("WANDB_API_KEY", key)
    with wandb_server() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        with open_log(tmp_path, store, mode="online") as log:
            log.log(1, train__loss=3.0)
    assert len(list((tmp_path / "wandb").glob("offline-run-*"))) == 1
    assert re.search(r"W&B refuses this job \(.*API key.*\): this job writes offline", caplog.text)
