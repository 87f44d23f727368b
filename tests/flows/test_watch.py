"""Which configurations and runs the watcher looks after, and that nothing keeps it from the others."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from prefect.client.schemas.objects import FlowRun, State
from prefect.states import Completed, Crashed, Pending, Running

from flows import watch
from neox_core.config import RunConfig
from neox_core.errors import LaunchError
from neox_core.storage.claims import try_claim_name
from tests.e2e.runs import write_run


class Server:
    """Answers what runs there are."""

    def __init__(self, *runs: FlowRun) -> None:
        self.runs = runs

    def read_flow_runs(self, flow_run_filter: Any, **rest: Any) -> list[FlowRun]:
        tags, types = flow_run_filter.tags.all_, flow_run_filter.state and flow_run_filter.state.type.any_
        return [run for run in self.runs if tags == ["llemma"] and run.state and run.state.type in types]

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *error: object) -> None:
        pass


def run_of(config: Any, state: State, deployment: UUID | None = None) -> FlowRun:
    return FlowRun(flow_id=uuid4(), name="train", state=state, parameters={"config": config}, deployment_id=deployment)


@pytest.fixture
def looked_at(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """What the steps were about."""
    seen: list[tuple[str, Any]] = []

    class Reconciler:
        def __init__(self, client: Any, config: RunConfig, *rest: Any) -> None:
            self.config = config

        def reconcile(self, run: FlowRun) -> None:
            seen.append(("reconcile", run.id))
            if run.parameters["config"].endswith("silent/run.yml"):
                raise LaunchError("squeue does not answer")

    def tell(config: RunConfig, runs: Sequence[FlowRun], *rest: Any) -> None:
        seen.append(("tell", (config.workdir.parent.name, len(runs))))

    monkeypatch.setattr(watch, "Reconciler", Reconciler)
    monkeypatch.setattr(watch, "show_progress", lambda client, config: None)
    monkeypatch.setattr(watch, "tell_news", tell)
    return seen


def look(monkeypatch: pytest.MonkeyPatch, *runs: FlowRun) -> None:
    monkeypatch.setattr(watch, "get_client", lambda sync_client: Server(*runs))
    watch.watch.fn()


def begun(folder: Path) -> str:
    path = write_run(folder)
    (folder / "run").mkdir()
    return str(path)


def test_every_configuration_is_looked_after_whatever_fails_with_another(
    tmp_path: Path, looked_at: list[tuple[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    silent, well = begun(tmp_path / "silent"), begun(tmp_path / "well")
    runs = [run_of(silent, Running()), run_of(well, Pending()), run_of(well, Completed())]
    strange = [run_of("missing.yml", Running()), run_of(None, Running())]
    look(monkeypatch, *strange, *runs)
    assert looked_at == [
        ("reconcile", runs[0].id),
        ("tell", ("silent", 1)),
        ("reconcile", runs[1].id),
        ("tell", ("well", 2)),
    ]


def test_a_crashed_run_is_passed_over_if_there_is_a_newer_one(
    tmp_path: Path, looked_at: list[tuple[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, deployment, other = begun(tmp_path), uuid4(), uuid4()
    newest, older = run_of(config, Completed(), deployment), run_of(config, Crashed(), deployment)
    alone = run_of(config, Crashed(), other)
    look(monkeypatch, newest, older, alone)
    assert [what for step, what in looked_at if step == "reconcile"] == [alone.id]


def test_a_workdir_that_another_watcher_looks_at_is_left_to_it(
    tmp_path: Path, looked_at: list[tuple[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(begun(tmp_path), Running())
    with try_claim_name(tmp_path / "run", "watch"):
        look(monkeypatch, run)
    assert looked_at == []
    look(monkeypatch, run)
    assert ("reconcile", run.id) in looked_at
