"""Fingerprints, artifacts on disk, and what makes them invalid."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from neox_core import artifact as artifact_module
from neox_core.artifact import (
    ARTIFACT_FILE,
    Artifact,
    DigestCache,
    find_verified,
    fingerprint,
    publish,
    read_artifact,
)
from neox_core.errors import CheckpointError
from neox_core.storage.digest import sha256_of
from tests.paths import ROOT

LOGICAL = {"steps": 5, "optimizer": {"lr": 1e-4, "betas": [0.9, 0.95]}, "name": "Größe"}
INPUTS = {"prepare-data": "aa", "convert": "bb"}


@pytest.mark.parametrize("text", ["[]", "null", "7", '{"x": null}', '{"x": [1]}', "{"])
def test_a_damaged_memory_of_digests_is_forgotten(text: str, tmp_path: Path) -> None:
    (tmp_path / "x").write_text("content")
    text = text.replace("x", str((tmp_path / "x").resolve()))
    (tmp_path / ".digests.json").write_text(text)
    expected = hashlib.sha256(b"content").hexdigest()
    assert DigestCache(tmp_path / ".digests.json").digest(tmp_path / "x") == expected


def test_fingerprint_is_the_hash_of_canonical_json() -> None:
    text = (
        '{"config":{"name":"Gr\\u00f6\\u00dfe","optimizer":{"betas":[0.9,0.95],"lr":0.0001},"steps":5},'
        '"inputs":{"convert":"bb","prepare-data":"aa"},"name":"train"}'
    )
    assert fingerprint("train", LOGICAL, INPUTS) == hashlib.sha256(text.encode()).hexdigest()


def test_fingerprint_does_not_depend_on_order_process_or_place(tmp_path: Path) -> None:
    turned = {key: LOGICAL[key] for key in reversed(LOGICAL)} | {"optimizer": {"betas": (0.9, 0.95), "lr": 1e-4}}
    here = fingerprint("train", LOGICAL, INPUTS)
    assert fingerprint("train", turned, dict(reversed(INPUTS.items()))) == here
    code = f"from neox_core.artifact import fingerprint; print(fingerprint('train', {turned!r}, {INPUTS!r}))"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "77"}
    command = [sys.executable, "-c", code]
    elsewhere = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert elsewhere.stdout.strip() == here


@pytest.mark.parametrize(
    ("name", "logical", "inputs"),
    [
        ("evaluate", LOGICAL, INPUTS),
        ("train", LOGICAL | {"steps": 6}, INPUTS),
        ("train", LOGICAL | {"steps": "5"}, INPUTS),
        ("train", LOGICAL | {"more": None}, INPUTS),
        ("train", LOGICAL, INPUTS | {"convert": "cc"}),
        ("train", LOGICAL, {"prepare-data": "bb", "convert": "aa"}),
        ("train", {}, LOGICAL | INPUTS),
    ],
)
def test_fingerprint_depends_on_everything_else(name: str, logical: dict[str, Any], inputs: dict[str, Any]) -> None:
    assert fingerprint(name, logical, inputs) != fingerprint("train", LOGICAL, INPUTS)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), Path("/tmp"), {1, 2}, b"bytes", object()])
def test_values_that_another_process_might_hash_otherwise_are_refused(value: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        fingerprint("train", {"deep": [{"value": value}]}, {})


@pytest.fixture
def cache(tmp_path: Path) -> DigestCache:
    return DigestCache(tmp_path / "digests.json")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two files to publish, one of them in a subfolder, and a hidden one that is no part of the result."""
    folder = tmp_path / "artifact"
    (folder / "sub").mkdir(parents=True)
    (folder / "b.bin").write_bytes(b"12345")
    (folder / "sub" / "a.txt").write_text("text")
    (folder / ".b.bin.tmp").write_text("left by a killed run")
    return folder


def draft() -> Artifact:
    return Artifact("train", "f" * 64, INPUTS, {"steps": 5}, files=(), summary={"loss": 2.5})


def test_publish_records_every_file(folder: Path, cache: DigestCache) -> None:
    published = publish(draft(), folder, cache)
    assert [(record.path, record.size, record.sha256) for record in published.files] == [
        ("b.bin", 5, hashlib.sha256(b"12345").hexdigest()),
        ("sub/a.txt", 4, hashlib.sha256(b"text").hexdigest()),
    ]
    content = json.loads((folder / ARTIFACT_FILE).read_text())
    assert str(folder) not in json.dumps(content)
    assert content["software"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert (published.name, published.inputs, published.summary) == ("train", INPUTS, {"loss": 2.5})
    assert read_artifact(folder) == published
    assert find_verified(folder, "f" * 64, cache) == published


def test_an_artifact_may_be_moved_and_published_again(folder: Path, cache: DigestCache) -> None:
    first = publish(draft(), folder, cache)
    moved = folder.rename(folder.with_name("moved"))
    found = find_verified(moved, "f" * 64, cache)
    assert found is not None
    assert (found.files, found.folder) == (first.files, moved)
    assert publish(draft(), moved, cache).files == first.files  # artifact.json is not recorded in itself


def change(path: Path, content: bytes) -> None:
    """Change a file, with a time of its own however coarse the clock is."""
    before = path.stat().st_mtime_ns
    path.write_bytes(content)
    os.utime(path, ns=(before + 1_000_000, before + 1_000_000))


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: change(folder / "b.bin", b"12346"),
        lambda folder: change(folder / "b.bin", b"123456"),
        lambda folder: change(folder / "b.bin", b""),
        lambda folder: (folder / "sub" / "a.txt").unlink(),
        lambda folder: (folder / ARTIFACT_FILE).unlink(),
        lambda folder: (folder / ARTIFACT_FILE).write_text("{"),
        lambda folder: (folder / ARTIFACT_FILE).write_text("[1]"),
        lambda folder: (folder / ARTIFACT_FILE).write_text('{"files": [{"path": "b.bin"}]}'),
        lambda folder: (folder / ARTIFACT_FILE).write_bytes(b"\xff\xfe"),
        lambda folder: (folder / ARTIFACT_FILE).write_text('{"files": [1]}'),
        lambda folder: (folder / ARTIFACT_FILE).write_text('{"files": null}'),
    ],
    ids=[
        "one byte",
        "longer",
        "empty",
        "missing file",
        "no artifact.json",
        "half of it",
        "a list",
        "fields missing",
        "not text",
        "records of another kind",
        "no records",
    ],
)
def test_damage_is_noticed(folder: Path, cache: DigestCache, damage: Callable[[Path], object]) -> None:
    publish(draft(), folder, cache)
    damage(folder)
    assert find_verified(folder, "f" * 64, cache) is None
    assert find_verified(folder, "f" * 64, DigestCache(folder.with_name("other.json"))) is None


def test_another_fingerprint_is_another_artifact(folder: Path, cache: DigestCache) -> None:
    publish(draft(), folder, cache)
    assert find_verified(folder, "e" * 64, cache) is None


def test_why_an_artifact_cannot_be_read(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no artifact\.json: the stage that makes it has not finished"):
        read_artifact(folder)
    (folder / ARTIFACT_FILE).write_text("{")
    with pytest.raises(CheckpointError, match=r"artifact\.json is damaged .*: delete the folder to rebuild it"):
        read_artifact(folder)


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files whose content is read to be hashed."""
    names: list[str] = []

    def count(path: Path) -> str:
        names.append(path.name)
        return sha256_of(path)

    monkeypatch.setattr(artifact_module, "sha256_of", count)
    return names


def test_digests_are_remembered_until_the_file_changes(tmp_path: Path, hashed: list[str]) -> None:
    path = tmp_path / "data.bin"
    path.write_bytes(b"one")
    memory = tmp_path / "digests.json"
    assert DigestCache(memory).digest(path) == hashlib.sha256(b"one").hexdigest()
    assert DigestCache(memory).digest(path) == hashlib.sha256(b"one").hexdigest()
    assert hashed == ["data.bin"]
    change(path, b"two")  # the same size
    assert DigestCache(memory).digest(path) == hashlib.sha256(b"two").hexdigest()
    assert hashed == ["data.bin"] * 2


def test_a_file_that_grows_while_it_is_hashed_is_hashed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, memory = tmp_path / "data.bin", tmp_path / "digests.json"
    path.write_bytes(b"one")

    def hash_and_grow(path: Path) -> str:
        digest = sha256_of(path)
        with path.open("ab") as file:
            file.write(b", two")
        return digest

    with monkeypatch.context() as patch:
        patch.setattr(artifact_module, "sha256_of", hash_and_grow)
        assert DigestCache(memory).digest(path) == hashlib.sha256(b"one").hexdigest()
    assert DigestCache(memory).digest(path) == hashlib.sha256(b"one, two").hexdigest()


def test_digests_come_in_order_and_only_what_is_new_is_hashed(tmp_path: Path, hashed: list[str]) -> None:
    paths = [tmp_path / name for name in "cab"]
    for path in paths:
        path.write_text(path.name)
    cache = DigestCache(tmp_path / "digests.json")
    cache.digest(paths[1])
    assert cache.digests(paths) == [hashlib.sha256(name.encode()).hexdigest() for name in "cab"]
    assert sorted(hashed) == ["a", "b", "c"]


@pytest.mark.parametrize("content", ["{", "", "\x00"])
def test_a_lost_memory_costs_time_alone(tmp_path: Path, content: str) -> None:
    memory = tmp_path / "digests.json"
    memory.write_text(content)
    (tmp_path / "data").write_text("x")
    assert DigestCache(memory).digest(tmp_path / "data") == hashlib.sha256(b"x").hexdigest()
