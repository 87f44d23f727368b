"""A run with a scripted scheduler."""

from __future__ import annotations

from pathlib import Path

import pytest

from neox_core.artifact import Artifact
from neox_core.config import RunConfig
from neox_core.errors import TrainingError
from tasks.identity.current import note_current
from tasks.identity.stage import StageResult
from tasks.identity.training import resolve_training
from tasks.jobs.executor import Resources
from tasks.jobs.launch import JobPlan, attach_or_submit
from tasks.jobs.registry import register_executor
from tests.e2e.runs import Run, copy_text, write_run
from tests.tasks.jobs.scripted_executor import ScriptedExecutor


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    """A run whose first two stages have finished."""
    copy_text(tmp_path)
    config = Run(write_run(tmp_path)).config
    for name, fingerprint in (("prepare-data", "d" * 64), ("convert", "c" * 64)):
        artifact = Artifact(name, fingerprint, {}, config.model_dump(mode="json"), (), {})
        note_current(config, StageResult(artifact, skipped=False))
    return config


@pytest.fixture
def cluster(config: RunConfig) -> ScriptedExecutor:
    """A scheduler with the training's job, 1, which refuses to go on when it runs."""
    scheduler = ScriptedExecutor()
    register_executor("scripted", lambda: scheduler)
    key = resolve_training(config).fingerprint
    attach_or_submit(JobPlan(config.workdir / "jobs", "train", key, [(refuse, ())], Resources(), "scripted"))
    return scheduler


def refuse() -> None:
    """As a rank that must not go on."""
    raise TrainingError("the loss is not finite")
