"""A stage's progress in Prefect."""

from __future__ import annotations

from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest

from flows import progress
from flows.flow_runs import interruption
from flows.progress import stage_progress

KEY = "train-progress-small"


class Server:
    """Stands for Prefect's artifacts."""

    def __init__(self) -> None:
        self.id = uuid4()
        self.updates: list[tuple[float, str]] = []
        self.away = False

    def create(self, progress: float, key: str, description: str) -> UUID:
        assert (progress, key, description) == (0.0, KEY, "train")
        return self.id

    def update(self, artifact_id: UUID, progress: float, description: str) -> None:
        assert artifact_id == self.id
        if self.away:
            raise httpx.ConnectError("All connection attempts failed")
        self.updates.append((progress, description))


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    server = Server()
    monkeypatch.setattr(progress, "create_progress_artifact", server.create)
    monkeypatch.setattr(progress, "update_progress_artifact", server.update)
    monkeypatch.setattr(progress, "_ARTIFACT_SECONDS", 0.0)
    return server


def test_only_news_is_reported(server: Server) -> None:
    with stage_progress("train", KEY) as report:
        for share, text in ((0.25, "step 1"), (0.25, "step 1"), (0.5, "step 2")):
            report(share, text)
    assert server.updates == [(25.0, "train: step 1"), (50.0, "train: step 2"), (100.0, "train")]


def test_reports_are_seconds_apart(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_ARTIFACT_SECONDS", 3600.0)
    with stage_progress("train", KEY) as report:
        report(0.25, "step 1")
        report(0.5, "step 2")
    assert server.updates == [(100.0, "train")]


def test_a_failed_stage_stays_where_it_was(server: Server) -> None:
    def flow() -> None:
        with stage_progress("train", KEY) as report:
            report(0.25, "step 1")
            raise ValueError("diverged")

    with pytest.raises(ValueError, match="diverged"):
        flow()
    assert server.updates == [(25.0, "train: step 1")]


def test_a_server_that_is_away_costs_a_warning_not_the_run(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    with stage_progress("train", KEY) as report:
        server.away = True
        report(0.25, "step 1")
        server.away = False
        report(0.5, "step 2")
    assert server.updates == [(50.0, "train: step 2"), (100.0, "train")]
    assert "progress was not reported (All connection attempts failed): train: step 1" in caplog.text


def test_an_interrupted_flow_ends_at_its_next_report(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def flow(config: Any) -> None:
        with stage_progress("train", KEY) as report:
            interruption._interruption.get().append(KeyboardInterrupt())  # type: ignore[union-attr]
            report(0.25, "step 1")

    with pytest.raises(KeyboardInterrupt):
        interruption.side_by_side("config", flow)
    assert server.updates == []
