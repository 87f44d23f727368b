"""Fixtures of several modules."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.tasks.jobs.slurm.fake_slurm import FakeSlurm


@pytest.fixture
def fake_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    folder = tmp_path / "slurm"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setattr("tasks.jobs.slurm.executor.SlurmExecutor.poll_seconds", -1.0)
    for name in ("_SILENCE_SECONDS", "_MEANWHILE_SECONDS"):
        monkeypatch.setattr(f"tasks.jobs.retry.{name}", 0.0)
    return FakeSlurm(folder)
