"""Names tell configurations, trainings and attempts apart."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flows.flow_runs import names
from neox_core.artifact import Artifact
from tasks.identity.current import note_current
from tasks.identity.stage import StageResult
from tasks.identity.training import resolve_training
from tests.e2e.runs import Run, copy_text, write_run


def named(monkeypatch: pytest.MonkeyPatch, run_count: int = 1, **parameters: Any) -> str:
    runtime = SimpleNamespace(flow_name="train", parameters=parameters, run_count=run_count)
    monkeypatch.setattr(names, "flow_run", runtime)
    return names.run_name()


def test_a_runs_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy_text(tmp_path)
    run = Run(write_run(tmp_path))
    path = str(run.path)
    assert named(monkeypatch, config=path) == "train small"
    assert named(monkeypatch, config=path, overrides=["name=other"]) == "train other"
    for stage in ("prepare-data", "convert"):
        artifact = Artifact(stage, "f" * 64, {}, run.config.model_dump(mode="json"), (), {})
        note_current(run.config, StageResult(artifact, skipped=False))
    head = resolve_training(run.config).fingerprint[:8]
    assert named(monkeypatch, run_count=3, config=path) == f"train small {head} attempt 3"
    assert named(monkeypatch, config="missing.yml") == "train missing.yml"


def test_an_artifacts_key(tmp_path: Path) -> None:
    config = Run(write_run(tmp_path, {"name": "Llemma_7B.v2"})).config
    assert names.artifact_key(config, "train-progress") == "train-progress-llemma-7b-v2"
