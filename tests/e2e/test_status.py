"""`llemma status` and `llemma logs` on the finished chain, and on parts of it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from flows.cli import app
from infra.prefect.services import ServiceRecord
from infra.processes import ProcessRecord
from neox_core.errors import ConfigError
from tasks import overview
from tasks.identity.training import resolve_training
from tasks.jobs.status import Status
from tasks.overview import begun_runs, last_incident, stage_views
from tests.e2e.conftest import Chain
from tests.e2e.runs import STEPS, Run

pytestmark = pytest.mark.e2e


def shown(*arguments: str) -> str:
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


def test_a_finished_run(chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    views = stage_views(chain.run.config)
    assert [view.state for view in views] == ["finished"] * 5
    assert all(view.place is not None and view.place.is_dir() for view in views)
    assert views[2].text.startswith(f"step {STEPS} of {STEPS}, loss ")
    assert views[3].text == f"3 checkpoints, the last of step {STEPS}"
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    assert "report.html" in shown("status", str(chain.run.path))
    assert "no server was started here (`llemma up`)" in shown("status", str(chain.run.path))
    (tmp_path / "services").mkdir()
    ServiceRecord(ProcessRecord.of(os.getpid()), None, 4300).write(tmp_path, "server")
    assert "http://127.0.0.1:4300" in shown("status", str(chain.run.workdir))
    assert [config.name for config in begun_runs(chain.run.workdir)] == [chain.run.config.name]
    assert "trainings in" in shown("status", str(chain.run.workdir))


def test_logs_end_with_what_ranks_said_last(chain: Chain) -> None:
    for stage in ("train", "evaluate"):
        text = shown("logs", str(chain.run.path), stage, "-n", "3")
        assert text.count("==>") == 2
        assert text.count("Exiting after successful completion") >= 2
    with pytest.raises(ConfigError, match="'export' has no jobs with logs: give train or evaluate"):
        shown("logs", str(chain.run.path), "export")


@pytest.mark.parametrize(
    ("status", "state", "text"),
    [
        (Status("pending", reason="Resources"), "at work", "Resources"),
        (Status("failed", reason="OUT_OF_MEMORY"), "failed", "OUT_OF_MEMORY"),
    ],
)
def test_a_training_that_has_not_finished(
    copied: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, status: Status, state: str, text: str
) -> None:
    run = copied(".current", "prepare-data-*", "convert-*")
    assert [view.state for view in stage_views(run.config)] == ["finished", "finished", *["not begun"] * 3]
    folder = run.workdir / "jobs" / "attempt-0001"
    record: Any = SimpleNamespace(tasks=[SimpleNamespace(folder=folder)])
    job: Any = SimpleNamespace(job_id="17", status=lambda: status, record=record)
    monkeypatch.setattr(overview, "training_jobs", lambda training: [job])
    view = stage_views(run.config)[2]
    assert view.state == state
    assert "job 17" in view.text
    assert text in view.text


def test_nothing_was_begun(copied: Callable[..., Run]) -> None:
    run = copied()
    views = stage_views(run.config)
    assert [view.state for view in views] == ["not begun"] * 5
    assert views[2].text == "waits for prepare-data and convert"
    run.workdir.mkdir()
    with pytest.raises(ConfigError, match="no training was begun in"):
        shown("status", str(run.workdir))
    with pytest.raises(ConfigError, match="no job of train was submitted"):
        shown("logs", str(run.path))


def test_the_last_incident_in_words(copied: Callable[..., Run]) -> None:
    scratch = resolve_training(copied(".current").config).scratch
    assert last_incident(scratch) == ""
    scratch.mkdir(parents=True)
    lines = [f'{{"step": {step}, "problem": "the loss is NaN", "action": "skip"}}\n' for step in (3, 5)]
    (scratch / "incidents.jsonl").write_text("".join(lines))
    assert last_incident(scratch) == "step 5: the loss is NaN (skip)"
