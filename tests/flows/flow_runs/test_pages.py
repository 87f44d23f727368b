"""What a stage's page in Prefect shows, and when it is renewed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest

from flows.flow_runs import pages
from flows.flow_runs.pages import StagePage
from tasks.identity.training import Training, resolve_training
from tasks.report.places import Place, web_address
from tests.e2e.runs import Run, write_run
from tests.tasks.test_cancel import note_finished


class Server:
    """Stands for Prefect's artifacts: by key their newest content."""

    def __init__(self) -> None:
        self.content: dict[str, str] = {}
        self.keys: dict[UUID, str] = {}
        self.away = False

    def create(self, key: str, content: str) -> UUID:
        made = uuid4()
        self.keys[made], self.content[key] = key, content
        return made

    def update_artifact(self, artifact_id: UUID, update: Any) -> None:
        if self.away:
            raise httpx.ConnectError("no connection")
        self.content[self.keys[artifact_id]] = update.data

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    server = Server()
    monkeypatch.setattr(pages, "_create_markdown", server.create)
    monkeypatch.setattr(pages, "_create_image", server.create)
    monkeypatch.setattr(pages, "get_client", lambda sync_client: server)
    return server


@pytest.fixture
def training(tmp_path: Path) -> Training:
    config = Run(write_run(tmp_path, {"storage": {"endpoint_url": "http://127.0.0.1:9"}})).config
    note_finished(config)
    training = resolve_training(config)
    training.scratch.mkdir(parents=True)
    return training


def add_step(training: Training, step: int) -> None:
    with (training.scratch / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": step, "train/loss": 9.0 / step}) + "\n")


def test_places_and_the_loss_are_shown_and_renewed(
    server: Server, training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = StagePage(training, "train")
    page.renew()
    places = server.content["train-places-small"]
    prefix = f"s3://llemma/toy/{training.prefix}"
    assert f"[{prefix}](http://127.0.0.1:9/llemma/toy/{training.prefix})" in places
    assert f"[{prefix}/report.html](http://127.0.0.1:9/llemma/toy/{training.prefix}/report.html)" in places
    assert f"```\n{training.config.workdir}/report.html\n```" in places
    assert set(server.content) == {"train-places-small"}

    add_step(training, 1)
    page.renew()  # too early
    assert set(server.content) == {"train-places-small"}
    page.renew(now=True)
    first = server.content["train-loss-small"]
    add_step(training, 2)
    monkeypatch.setattr(pages, "job_place", lambda *_: Place("SLURM job 17: its logs", "/logs/attempt-0001"))
    page.renew(now=True)
    assert server.content["train-loss-small"] != first
    assert "**SLURM job 17: its logs**\n\n```\n/logs/attempt-0001\n```" in server.content["train-places-small"]
    assert len(server.keys) == 2


def test_a_server_that_is_away_costs_a_warning(
    server: Server, training: Training, caplog: pytest.LogCaptureFixture
) -> None:
    page = StagePage(training, "train")
    add_step(training, 1)
    page.renew()
    add_step(training, 2)
    server.away = True
    page.renew(now=True)
    assert "the page of train is not renewed: no connection" in caplog.text


def test_a_bucket_of_aws_is_opened_in_its_console(training: Training) -> None:
    changed = training.config.storage.model_copy(update={"endpoint_url": None})
    store = type(training.store)(changed)
    assert web_address(store, "train-1").startswith(
        "https://console.aws.amazon.com/s3/buckets/llemma?region=us-east-1&"
    )
