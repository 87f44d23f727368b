"""`llemma doctor`: what is wrong with the surroundings, and the way out."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from flows.cli import app
from neox_core.config import LaunchConfig, RunConfig, StorageConfig, WandbConfig
from neox_core.storage.object_store import ObjectStore
from tasks import doctor
from tasks.doctor import Finding, checkpoint_bytes, examine
from tests.e2e.runs import Run, copy_text, write_run


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    copy_text(tmp_path)
    return Run(write_run(tmp_path)).config


def found(config: RunConfig) -> dict[str, Finding]:
    return {finding.what: finding for finding in examine(config)}


def test_all_is_good(config: RunConfig, tmp_path: Path) -> None:
    findings = found(config)
    assert {finding.state for finding in findings.values()} == {"good"}
    assert list(findings) == ["packages", "disk", "launcher", "GPUs", "object store", "W&B", "run"]
    assert "embedded" in findings["object store"].text
    result = CliRunner().invoke(app, ["doctor", str(tmp_path / "run.yml")])
    assert result.exit_code == 0
    assert "object store" in result.stdout


def test_a_store_is_written_read_and_left_as_it_was(
    config: RunConfig, storage_config: StorageConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config.model_copy(update={"storage": storage_config})
    finding = found(config)["object store"]
    assert finding.state == "good"
    assert "written, read and deleted" in finding.text
    assert ObjectStore(storage_config).is_empty()
    monkeypatch.setattr(ObjectStore, "clock", lambda self: time.time() - 600)
    late = found(config)["object store"]
    assert late.state == "warning"
    assert "this clock is +600 s from the store's" in late.text
    away = storage_config.model_copy(update={"endpoint_url": "http://127.0.0.1:1"})
    broken = found(config.model_copy(update={"storage": away}))["object store"]
    assert broken.state == "fault"
    assert "127.0.0.1:1" in broken.text


def test_faults_say_the_way_out(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    version = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "wandb" else version(name))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=checkpoint_bytes(config)))
    shutil.rmtree(config.data.input)
    launch = LaunchConfig(device="cuda", executor="local", ranks_per_node=2)
    changed = config.model_copy(update={"launch": launch, "wandb": WandbConfig(mode="online")})
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    findings = found(changed)
    assert findings["packages"].text.startswith("wandb missing: run `pip install")
    assert findings["disk"].state == "fault"
    assert findings["launcher"].state == "fault"
    assert "login node" in findings["GPUs"].text
    assert "WANDB_API_KEY is not set" in findings["W&B"].text
    assert findings["run"].state == "fault"


def test_a_fault_is_the_exit_code(tmp_path: Path) -> None:
    copy_text(tmp_path)
    path = write_run(tmp_path, {"storage": {"endpoint_url": "http://127.0.0.1:1"}})
    result = CliRunner().invoke(app, ["doctor", str(path)])
    assert result.exit_code == 1
    assert "fault" in result.stdout
