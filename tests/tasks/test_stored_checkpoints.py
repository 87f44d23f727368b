"""`llemma checkpoint`: what is listed, what is found damaged, what arrives, and what may be removed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from neox_core.artifact import Artifact, FileRecord
from neox_core.checkpoint.manifest import Manifest, checkpoint_key, object_key, publish_manifest
from neox_core.config import StorageConfig, load_config
from neox_core.storage.object_store import ObjectStore
from tasks.identity.current import note_current
from tasks.identity.specs import CONVERT, PREPARE_DATA
from tasks.identity.stage import StageResult
from tasks.identity.training import resolve_training
from tests.flows.cli.command import run_command
from tests.paths import ROOT

CONTENT = b"weights" * 1000

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def path(tmp_path: Path, storage_config: StorageConfig) -> Path:
    path = tmp_path / "run.yml"
    content = {
        "include": str(ROOT / "configs/toy.yml"),
        "workdir": "run",
        "storage": {"url": storage_config.url, "endpoint_url": storage_config.endpoint_url},
    }
    path.write_text(yaml.safe_dump(content))
    config = load_config(path)
    for stage in (PREPARE_DATA, CONVERT):
        note_current(
            config, StageResult(Artifact(stage, "d" * 64, {}, config.model_dump(mode="json"), (), {}), skipped=False)
        )
    training = resolve_training(config)
    for step in (4, 8):
        publish(training.store, training.prefix, training.fingerprint, step)
    training.store.put_text(object_key(training.prefix, checkpoint_key(12), "state.pt"), "half")
    return path


def publish(store: ObjectStore, prefix: str, fingerprint: str, step: int) -> None:
    store.put_bytes(object_key(prefix, checkpoint_key(step), "state.pt"), CONTENT)
    files = (FileRecord("state.pt", len(CONTENT), hashlib.sha256(CONTENT).hexdigest()),)
    publish_manifest(store, prefix, Manifest(step, 8 * step, files, layout={}, fingerprint=fingerprint, config={}))


@pytest.fixture
def llemma(path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    def run(command: str, *options: str) -> tuple[int, str, str]:
        return run_command(monkeypatch, capsys, "checkpoint", command, str(path), *options)

    return run


def test_all_that_there_is_is_listed(llemma: Command) -> None:
    status, output, _ = llemma("ls")
    assert status == 0
    rows = [line.split("│")[1:4] for line in output.splitlines() if "complete" in line]
    assert [[cell.strip() for cell in row[:2]] for row in rows] == [
        ["4", "complete"],
        ["8", "complete"],
        ["12", "incomplete"],
    ]


def test_damage_is_found(llemma: Command, path: Path) -> None:
    status, output, _ = llemma("verify")
    assert (status, "every file is as it was written" in output) == (0, True)
    training = resolve_training(load_config(path))
    training.store.put_bytes(object_key(training.prefix, checkpoint_key(4), "state.pt"), CONTENT[:-1] + b"?")
    assert llemma("verify", "--step", "8")[0] == 0
    status, _, error = llemma("verify", "--step", "4")
    assert (status, "step 4: 1 files are not what was written: state.pt" in error) == (1, True)
    status, _, error = llemma("verify", "--step", "12")
    assert (status, "there is no complete checkpoint of step 12" in error) == (1, True)


def test_a_checkpoint_arrives_with_its_manifest(llemma: Command, tmp_path: Path) -> None:
    assert llemma("fetch", "--to", str(tmp_path / "here"))[0] == 0
    folder = tmp_path / "here" / "global_step8"
    assert (folder / "state.pt").read_bytes() == CONTENT
    assert Manifest.from_json((folder / "manifest.json").read_text()).step == 8


def test_the_newest_complete_one_is_removed_by_force_only(llemma: Command, path: Path) -> None:
    training = resolve_training(load_config(path))

    def left() -> list[str]:
        return [info.key.removeprefix(f"{training.prefix}/") for info in training.store.list(f"{training.prefix}/")]

    assert llemma("rm", "--step", "4", "--step", "12")[0] == 0
    assert left() == ["global_step8/manifest.json", "global_step8/state.pt"]
    status, _, error = llemma("rm", "--step", "8")
    assert (status, "step 8 is the newest complete checkpoint" in error) == (1, True)
    status, _, error = llemma("rm", "--step", "5")
    assert (status, "there is nothing of step 5" in error) == (1, True)
    assert llemma("rm", "--step", "8", "--force")[0] == 0
    assert left() == []
