from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest

from neox_core.artifact import FileRecord
from neox_core.checkpoint.manifest import (
    Manifest,
    checkpoint_key,
    download_checkpoint,
    list_checkpoints,
    publish_manifest,
)
from neox_core.errors import CheckpointError
from neox_core.storage.object_store import ObjectStore

CONTENTS = {"layer_00-model_00-model_states.pt": b"embedding" * 100, "rng/rank_0.bin": b"\x00\x01", "empty": b""}


def manifest_of(step: int, contents: dict[str, bytes] = CONTENTS) -> Manifest:
    return Manifest(
        step=step,
        sequences_consumed=step * 16,
        files=tuple(
            FileRecord(name, len(content), hashlib.sha256(content).hexdigest()) for name, content in contents.items()
        ),
        layout={"tensor": 2, "pipeline": 1, "data": 1},
        fingerprint="f" * 64,
        config={"train": {"steps": 10}},
        consumed={"arxiv": {"sequences": step * 10, "tokens": step * 2560, "epochs": 0.25}},
        software={"torch": "2.13.0"},
    )


def upload(store: ObjectStore, prefix: str, step: int, contents: dict[str, bytes] = CONTENTS) -> None:
    for name, content in contents.items():
        store.put_text(f"{prefix}/global_step{step}/{name}", content.decode())


def test_json_round_trip() -> None:
    manifest = manifest_of(7)
    assert Manifest.from_json(manifest.to_json()) == manifest
    assert json.loads(manifest.to_json())["files"][1]["path"] == "rng/rank_0.bin"
    assert checkpoint_key(7) == "global_step7"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"files": [{"path": 1}]}', '{"files": 3}', "null"])
def test_what_is_no_manifest(text: str) -> None:
    with pytest.raises(CheckpointError, match=r"damaged manifest\.json"):
        Manifest.from_json(text)


@pytest.mark.parametrize("path", ["../../outside", "/etc/outside"])
def test_a_manifest_may_not_write_outside_its_folder(path: str) -> None:
    with pytest.raises(CheckpointError, match="names a file outside"):
        Manifest.from_json(manifest_of(1, {path: b""}).to_json())


def test_published_checkpoints_are_found_in_order_of_steps(store: ObjectStore) -> None:
    for step in (100, 20, 3):
        upload(store, "run/checkpoints", step)
        publish_manifest(store, "run/checkpoints", manifest_of(step))
    upload(store, "run/other", 50)
    publish_manifest(store, "run/other", manifest_of(50))

    assert list_checkpoints(store, "run/checkpoints") == [manifest_of(3), manifest_of(20), manifest_of(100)]
    assert list_checkpoints(store, "run") == []


def test_a_checkpoint_without_its_files_is_not_published(store: ObjectStore) -> None:
    upload(store, "run", 5)
    store.delete(["run/global_step5/empty"])
    with pytest.raises(CheckpointError, match=r"run/global_step5 is incomplete.*empty is missing"):
        publish_manifest(store, "run", manifest_of(5))
    store.put_text("run/global_step5/empty", "not empty")
    with pytest.raises(CheckpointError, match="empty has 9 bytes instead of 0"):
        publish_manifest(store, "run", manifest_of(5))
    assert store.get_text("run/global_step5/manifest.json") is None


def test_incomplete_checkpoints_are_invisible_and_kept(store: ObjectStore, caplog: pytest.LogCaptureFixture) -> None:
    for step in (1, 2, 3, 4, 5, 6):
        upload(store, "run", step)
    for step in (2, 3, 4):
        publish_manifest(store, "run", manifest_of(step))
    store.put_text("run/global_step3/rng/rank_0.bin", "other size")
    store.delete(["run/global_step4/empty"])
    store.put_text("run/global_step5/manifest.json", '{"step": 5,')
    store.put_text("run/global_step6/manifest.json", manifest_of(7).to_json())
    store.put_text("run/global_stepX/manifest.json", manifest_of(7).to_json())
    before = store.list()

    assert list_checkpoints(store, "run") == [manifest_of(2)]
    assert store.list() == before
    warnings = "\n".join(record.getMessage() for record in caplog.records)
    assert "global_step3 is incomplete and ignored: rng/rank_0.bin has 10 bytes instead of 2" in warnings
    assert "global_step4 is incomplete and ignored: empty is missing" in warnings
    assert "global_step5/manifest.json ignored: damaged" in warnings
    assert "its manifest is of step 7" in warnings


def test_download_brings_only_what_is_wanted_and_missing(
    store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload(store, "run", 5)
    publish_manifest(store, "run", manifest_of(5))
    (manifest,) = list_checkpoints(store, "run")

    folder = download_checkpoint(store, "run", manifest, tmp_path, lambda path: path.startswith("layer_"))
    assert folder == tmp_path / "global_step5"
    assert [path.name for path in folder.rglob("*")] == ["layer_00-model_00-model_states.pt"]

    # the right size is not enough: this one must be fetched again
    (folder / "rng").mkdir()
    (folder / "rng" / "rank_0.bin").write_bytes(b"\x00\x02")
    fetched: list[str] = []
    get_file = ObjectStore.get_file
    monkeypatch.setattr(
        ObjectStore, "get_file", lambda self, key, *others: (fetched.append(key), get_file(self, key, *others))[1]
    )
    beats: list[int] = []
    download_checkpoint(store, "run", manifest, tmp_path, lambda path: True, lambda: beats.append(1))
    assert beats
    assert {path: (folder / path).read_bytes() for path in CONTENTS} == CONTENTS
    assert sorted(fetched) == ["run/global_step5/empty", "run/global_step5/rng/rank_0.bin"]


def test_a_damaged_object_is_noticed(store: ObjectStore, tmp_path: Path) -> None:
    upload(store, "run", 5)
    publish_manifest(store, "run", manifest_of(5))
    name = "layer_00-model_00-model_states.pt"
    store.put_text(f"run/global_step5/{name}", "Embedding" * 100)  # same size, other content
    wrong = hashlib.sha256(b"Embedding" * 100).hexdigest()
    right = manifest_of(5).files[0].sha256
    with pytest.raises(CheckpointError, match=rf"global_step5/{name} is damaged: SHA-256 {wrong} instead of {right}"):
        download_checkpoint(store, "run", manifest_of(5), tmp_path, lambda path: True)
    assert not (tmp_path / "global_step5" / name).exists()


def test_a_checkpoint_at_the_root_of_the_store(store: ObjectStore) -> None:
    store.put_text("global_step1/file", "x")
    manifest = replace(manifest_of(1, {"file": b"x"}))
    publish_manifest(store, "", manifest)
    assert list_checkpoints(store, "") == [manifest]
