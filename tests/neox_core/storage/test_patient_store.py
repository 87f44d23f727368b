"""The patient store behind a proxy that fails in every way: what it bears, what it says, and when it gives up."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from neox_core.artifact import FileRecord
from neox_core.checkpoint.manifest import Manifest, download_checkpoint, list_checkpoints, publish_manifest
from neox_core.config import StorageConfig
from neox_core.errors import CheckpointError, StorageError
from neox_core.retry import RetryPolicy
from neox_core.storage.digest import sha256_of
from neox_core.storage.object_store import ObjectStore
from neox_core.storage.patient_store import PatientStore, StoreGivenUp
from tests.faulty_s3 import FAULTS, FaultyS3, faulty_s3
from tests.meanwhile import meanwhile

READ_TIMEOUT = 0.5
"""Until the store's failure was noticed; a store on a busy machine may need more for a right answer."""
PATIENCE = 300.0
"""Seconds after which something hangs."""
PATIENT = RetryPolicy(120.0, first_wait=0.05, longest_wait=0.2)


@pytest.fixture
def proxy(storage_config: StorageConfig) -> Iterator[FaultyS3]:
    with faulty_s3(str(storage_config.endpoint_url)) as proxy:
        yield proxy


@pytest.fixture
def patient(storage_config: StorageConfig, proxy: FaultyS3) -> PatientStore:
    return patient_store(storage_config, proxy, PATIENT)


def patient_store(config: StorageConfig, proxy: FaultyS3, policy: RetryPolicy) -> PatientStore:
    return PatientStore(config.model_copy(update={"endpoint_url": proxy.url}), policy=policy)


def during(proxy: FaultyS3, patient: PatientStore, fault: str, act: Callable[[], object]) -> list[str]:
    """Act while the store fails until the patient store has said so, then works again; what it said was behind."""
    said: list[str] = []
    noticed = threading.Event()
    # A fault that changes an answer may go by unnoticed, or be noticed by who reads the answer only.
    is_unnoticed = fault in ("wrong bytes", "cut")
    client = patient._client

    def on_behind(text: str) -> None:
        said.append(text)
        patient._client = client
        noticed.set()

    def heal() -> None:
        assert proxy.failed.acquire(timeout=PATIENCE) if is_unnoticed else noticed.wait(PATIENCE)
        proxy.heal()

    patient.on_behind = on_behind
    if not is_unnoticed:
        patient._client = ObjectStore(patient.config, READ_TIMEOUT, 2)._client
    proxy.fail(fault)
    with meanwhile(heal):
        act()
    return said


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault not in ("wrong bytes", "cut")])
def test_a_store_that_fails_is_borne_in_all_requests(
    proxy: FaultyS3, patient: PatientStore, store: ObjectStore, tmp_path: Path, fault: str
) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * 100)
    said = during(proxy, patient, fault, lambda: patient.put_file(path, "a/file"))
    assert said[0].startswith(f"{store.url('a/file')} is behind since ")
    assert said[-1] == ""
    during(proxy, patient, fault, lambda: patient.put_text("a/text", "words"))
    assert store.get_text("a/text") == "words"
    found: list[object] = []
    during(proxy, patient, fault, lambda: found.append(patient.get_text("a/text")))
    during(proxy, patient, fault, lambda: found.append([info.key for info in patient.list("a/")]))
    assert found == ["words", ["a/file", "a/text"]]
    during(proxy, patient, fault, lambda: patient.get_file("a/file", tmp_path / "fetched"))
    assert sha256_of(tmp_path / "fetched") == sha256_of(path)


@pytest.mark.parametrize("fault", ["wrong bytes", "cut"])
def test_a_checkpoint_arrives_through_answers_that_are_damaged(
    proxy: FaultyS3, patient: PatientStore, store: ObjectStore, tmp_path: Path, fault: str
) -> None:
    manifest = publish(store, tmp_path)
    during(proxy, patient, fault, lambda: list_checkpoints(patient, "train"))
    fetched = tmp_path / "fetched"
    during(proxy, patient, fault, lambda: download_checkpoint(patient, "train", manifest, fetched, lambda _: True))
    assert sha256_of(fetched / "global_step3" / "state.pt") == manifest.files[0].sha256


def test_what_is_wrong_each_time_is_called_damaged(
    proxy: FaultyS3, patient: PatientStore, store: ObjectStore, tmp_path: Path
) -> None:
    manifest = publish(store, tmp_path)
    proxy.fail("wrong bytes")
    with pytest.raises(CheckpointError, match=r"state\.pt is damaged: SHA-256 .* 3 times") as error:
        download_checkpoint(patient, "train", manifest, tmp_path / "fetched", lambda _: True)
    assert "delete" not in str(error.value)
    assert not (tmp_path / "fetched" / "global_step3" / "state.pt").exists()


def publish(store: ObjectStore, folder: Path) -> Manifest:
    path = folder / "state.pt"
    path.write_bytes(bytes(range(256)) * 1000)
    store.put_file(path, "train/global_step3/state.pt")
    files = (FileRecord("state.pt", path.stat().st_size, sha256_of(path)),)
    manifest = Manifest(3, 24, files, layout={"tensor": 1}, fingerprint="f", config={})
    publish_manifest(store, "train", manifest)
    return manifest


@pytest.mark.parametrize("fault", ["503", "refused"])
def test_giving_up_is_one_line(storage_config: StorageConfig, proxy: FaultyS3, fault: str) -> None:
    patient = patient_store(storage_config, proxy, RetryPolicy(0.5, 0.05, 0.1))
    proxy.fail(fault)
    with pytest.raises(StoreGivenUp, match=r"gave up after \d+ attempts since .*") as error:
        patient.put_text("train/x", "words")
    text = str(error.value)
    assert f"bucket {patient.bucket}, key some/prefix/train/x, last answer: " in text
    assert ("SlowDown" if fault == "503" else "cannot reach the object store") in text
    assert "\n" not in text


def test_an_error_that_cannot_pass_is_raised_at_once(patient: PatientStore, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="local file of"):
        patient.put_file(tmp_path / "absent", "a")


def test_who_is_told_to_stop_does_not_wait(storage_config: StorageConfig, proxy: FaultyS3) -> None:
    patient = patient_store(storage_config, proxy, RetryPolicy(600.0, 600.0, 600.0))
    proxy.fail("500")

    def stop() -> None:
        assert proxy.failed.acquire(timeout=PATIENCE)
        patient.stopped.set()

    with meanwhile(stop), pytest.raises(StoreGivenUp):
        patient.list("a/")
