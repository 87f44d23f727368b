"""The checkpoint writer against a real store: what is uploaded, when a checkpoint exists, and how failures surface."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from neox_core.checkpoint import writer as writer_module
from neox_core.checkpoint.manifest import MANIFEST_FILE, Manifest, list_checkpoints
from neox_core.checkpoint.writer import CheckpointWriter
from neox_core.errors import CheckpointError, StorageError
from neox_core.storage.digest import sha256_of
from neox_core.storage.object_store import ObjectStore
from neox_core.train.resuming.local_copy import newest_local
from tests.full_disk import Disk, put_on_disk

PREFIX = "train-0123"
PATIENCE = 300.0
"""Seconds after which something hangs."""


def manifest(step: int) -> Manifest:
    return Manifest(step, 8 * step, files=(), layout={"tensor": 1}, fingerprint="0123", config={"name": "toy"})


@pytest.fixture
def new_writer(store: ObjectStore) -> Iterator[Callable[..., CheckpointWriter]]:
    """Makes writers, and ends their threads after the test whatever they do."""
    made: list[CheckpointWriter] = []
    channel = dist.HashStore()

    def make(rank: int = 0, world_size: int = 1, channel: Any = channel, **callbacks: Any) -> CheckpointWriter:
        made.append(CheckpointWriter(store, PREFIX, rank, world_size, channel, **callbacks))
        return made[-1]

    yield make
    for writer in made:
        writer.abandon()


def save(
    writer: CheckpointWriter, folder: Path, step: int, name: str = "state.pt", value: float = 1.0, **how: bool
) -> Path:
    """Save one small file of a step."""
    path = folder / f"global_step{step}" / name
    writer.save(manifest(step), lambda take: take({"weight": torch.full((3,), value)}, path), path.parent, **how)
    return path


def steps(store: ObjectStore) -> list[int]:
    """Steps whose checkpoint exists."""
    return [found.step for found in list_checkpoints(store, PREFIX)]


class Gate:
    """Holds up every call of a store's method until it is opened."""

    def __init__(self, store: ObjectStore, method: str) -> None:
        self.reached, self._open = threading.Event(), threading.Event()
        through = getattr(store, method)

        def wait(*args: Any) -> Any:
            self.reached.set()
            assert self._open.wait(PATIENCE)
            return through(*args)

        setattr(store, method, wait)

    def open(self) -> None:
        self._open.set()


def fail_upload(store: ObjectStore, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let uploads of files with this name fail."""
    through = store.put_file

    def put_file(path: Path, key: str, on_bytes: Any) -> None:
        if path.name == name:
            raise StorageError(f"no space for {key}")
        through(path, key, on_bytes)

    monkeypatch.setattr(store, "put_file", put_file)


def test_a_checkpoint_arrives_whole(
    new_writer: Callable[..., CheckpointWriter], store: ObjectStore, tmp_path: Path
) -> None:
    writer = new_writer()
    state = {
        "module": OrderedDict(a=torch.arange(4.0), b=torch.ones(2, dtype=torch.bfloat16)),
        "optimizer": [{"step": 3, "moments": (torch.zeros(2), None)}],
        "text": "kept",
    }
    path = tmp_path / "global_step5" / "state.pt"
    writer.save(manifest(5), lambda take: take(state, path), path.parent)
    writer.close()

    (found,) = list_checkpoints(store, PREFIX)
    assert (found.step, found.sequences_consumed, found.config) == (5, 40, {"name": "toy"})
    assert [(record.path, record.sha256) for record in found.files] == [("state.pt", sha256_of(path))]
    store.get_file(f"{PREFIX}/global_step5/state.pt", tmp_path / "fetched.pt")
    loaded = torch.load(tmp_path / "fetched.pt", weights_only=False)
    assert type(loaded["module"]) is OrderedDict
    assert torch.equal(loaded["module"]["a"], torch.arange(4.0))
    assert loaded["module"]["b"].dtype == torch.bfloat16
    assert loaded["optimizer"][0]["step"] == 3
    assert torch.equal(loaded["optimizer"][0]["moments"][0], torch.zeros(2))
    assert loaded["text"] == "kept"
    # Reports have done their work, and no temporary file stays.
    assert {info.key.rpartition("/")[2] for info in store.list(PREFIX)} == {"state.pt", "manifest.json"}
    assert [path.name for path in path.parent.iterdir()] == ["state.pt"]


def test_what_training_changes_afterwards_is_not_saved(
    new_writer: Callable[..., CheckpointWriter], store: ObjectStore, tmp_path: Path
) -> None:
    """Also of tensors deep in the state, of views and of parameters."""
    flat, weight = torch.zeros(1_000_000), torch.nn.Parameter(torch.ones(5))
    state = {"flat": {"part": flat[10:20]}, "list": [weight], "pair": (flat.view(1000, 1000)[:2, 0], 1)}
    writer = new_writer()
    gate = Gate(store, "put_file")

    def hand_over(take: Callable[[Any, Path], None]) -> None:
        take(state, tmp_path / "global_step1" / "state.pt")
        flat.fill_(7.0)  # before the upload starts ...

    writer.save(manifest(1), hand_over, tmp_path / "global_step1")
    assert gate.reached.wait(PATIENCE)
    with torch.no_grad():
        weight.fill_(7.0)  # ... and while it runs
    gate.open()
    writer.close()
    loaded = torch.load(tmp_path / "global_step1" / "state.pt", weights_only=False)
    assert torch.equal(loaded["flat"]["part"], torch.zeros(10))
    assert torch.equal(loaded["list"][0], torch.ones(5))
    assert torch.equal(loaded["pair"][0], torch.zeros(2))
    # Views are saved alone, not with the megabytes that they look at.
    assert (tmp_path / "global_step1" / "state.pt").stat().st_size < 10_000


def test_a_checkpoint_exists_when_all_ranks_have_reported(
    new_writer: Callable[..., CheckpointWriter], store: ObjectStore, tmp_path: Path
) -> None:
    first, second = new_writer(rank=0, world_size=2), new_writer(rank=1, world_size=2)
    path = save(first, tmp_path, 1, "b.pt")
    time.sleep(0.3)
    assert steps(store) == []
    assert not path.with_name("manifest.json").exists()
    save(second, tmp_path, 1, "a.pt", value=2.0)
    second.wait()
    first.close()
    (found,) = list_checkpoints(store, PREFIX)
    assert [(record.path, record.sha256) for record in found.files] == [
        (name, sha256_of(path.with_name(name))) for name in ("a.pt", "b.pt")
    ]
    assert not path.with_name("manifest.json").exists()  # the store has it


def test_what_is_only_on_local_disk_has_its_manifest_there(
    new_writer: Callable[..., CheckpointWriter], store: ObjectStore, tmp_path: Path
) -> None:
    writer = new_writer()
    gate = Gate(store, "put_file")
    save(writer, tmp_path, 1)
    assert gate.reached.wait(PATIENCE)
    found = newest_local(tmp_path, "0123")
    assert found is not None
    assert (found.step, [record.path for record in found.files]) == (1, ["state.pt"])
    assert newest_local(tmp_path, "4567") is None
    gate.open()
    writer.close()
    assert newest_local(tmp_path, "0123") is None


@pytest.mark.parametrize("surface", ["wait", "close"])
def test_a_failed_upload_surfaces_and_the_checkpoint_does_not_exist(
    new_writer: Callable[..., CheckpointWriter],
    store: ObjectStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    surface: str,
) -> None:
    fail_upload(store, "bad.pt", monkeypatch)
    failures: list[Exception] = []
    writer = new_writer(failed=failures.append)
    path = save(writer, tmp_path, 1, "bad.pt")
    with pytest.raises(StorageError, match=r"no space for train-0123/global_step1/bad.pt"):
        getattr(writer, surface)()
    assert [str(error) for error in failures] == ["no space for train-0123/global_step1/bad.pt"]
    assert steps(store) == []
    # What comes now stays on local disk.
    if surface == "wait":
        save(writer, tmp_path, 2, "good.pt")
        writer.wait_for_disk()
        assert steps(store) == []
    found = newest_local(tmp_path, "0123")
    assert path.is_file()
    assert found is not None
    assert found.step == (2 if surface == "wait" else 1)


def test_rank_0_hears_of_another_ranks_failure_at_once(
    new_writer: Callable[..., CheckpointWriter], store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does not wait for the report that cannot come."""
    fail_upload(store, "bad.pt", monkeypatch)
    first, second = new_writer(rank=0, world_size=2), new_writer(rank=1, world_size=2)
    save(first, tmp_path, 1, "good.pt")
    save(second, tmp_path, 1, "bad.pt")
    with pytest.raises(StorageError, match="no space"):
        second.wait()
    with pytest.raises(CheckpointError, match=r"rank 1: no space for .*bad\.pt"):
        first.wait()
    assert steps(store) == []


def test_an_upload_that_makes_progress_says_so(new_writer: Callable[..., CheckpointWriter], tmp_path: Path) -> None:
    beats: list[int] = []
    writer = new_writer(heartbeat=lambda: beats.append(1))
    save(writer, tmp_path, 1)
    writer.close()
    assert len(beats) >= 2  # written, and sent


def test_a_rank_that_never_reports_is_an_error(
    new_writer: Callable[..., CheckpointWriter], store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer_module, "_REPORT_TIMEOUT_SECONDS", -60 * store.config.patience_minutes)
    writer = new_writer(rank=0, world_size=3)
    save(writer, tmp_path, 1)
    with pytest.raises(CheckpointError, match=r"ranks \[1, 2\] have not written their files"):
        writer.close()
    assert steps(store) == []


def test_what_is_abandoned_does_not_wait_for_other_ranks(
    new_writer: Callable[..., CheckpointWriter], tmp_path: Path
) -> None:
    writer = new_writer(rank=0, world_size=2)
    save(writer, tmp_path, 1)
    abandoning = threading.Thread(target=writer.abandon, daemon=True)
    abandoning.start()
    abandoning.join(PATIENCE)
    assert not abandoning.is_alive()


def test_old_local_files_go_when_newer_ones_are_uploaded(
    new_writer: Callable[..., CheckpointWriter], store: ObjectStore, tmp_path: Path
) -> None:
    writer = new_writer()
    paths = [save(writer, tmp_path, step) for step in (1, 2)]
    writer.wait()
    gate = Gate(store, "put_file")
    paths.append(save(writer, tmp_path, 3))
    assert gate.reached.wait(PATIENCE)
    assert [path.is_file() for path in paths] == [True, True, True]  # step 3 is not in the store yet
    gate.open()
    writer.close()
    assert [path.is_file() for path in paths] == [False, True, True]
    assert steps(store) == [1, 2, 3]


def test_while_the_store_fails_newer_saves_replace_those_that_wait(
    new_writer: Callable[..., CheckpointWriter], store: ObjectStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    writer = new_writer()
    gate = Gate(store, "put_file")
    writer.reports.set_behind(True)
    paths = [save(writer, tmp_path, 1)]
    assert gate.reached.wait(PATIENCE)
    paths += [save(writer, tmp_path, step) for step in (2, 3, 4)]
    writer.wait_for_disk()
    gate.open()
    writer.reports.set_behind(False)
    writer.close()
    assert steps(store) == [1, 4]
    assert [path.is_file() for path in paths] == [True, False, False, True]
    assert "the store is behind, and step 3 replaces step 2" in caplog.text


def test_what_one_rank_replaced_is_not_published(
    new_writer: Callable[..., CheckpointWriter], store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    second_store = ObjectStore(store.config)
    first, second = new_writer(rank=0, world_size=2), new_writer(rank=1, world_size=2)
    second._uploads._store = second_store
    gate = Gate(second_store, "put_file")
    for step in (1, 2, 3):
        save(first, tmp_path, step, "b.pt")
        save(second, tmp_path, step, "a.pt")
        assert gate.reached.wait(PATIENCE)
        second.reports.set_behind(True)
    second.wait_for_disk()
    gate.open()
    second.reports.set_behind(False)
    second.wait()
    first.wait()
    assert steps(store) == [1, 3]


def test_a_save_waits_for_its_place_while_the_store_works(
    new_writer: Callable[..., CheckpointWriter], store: ObjectStore, tmp_path: Path
) -> None:
    """Host memory holds one copy of the state, and no checkpoint is left out because the store is slow."""
    writer = new_writer()
    gate = Gate(store, "put_file")
    for step in (1, 2, 3):
        save(writer, tmp_path, step)
    next_one = threading.Thread(target=save, args=(writer, tmp_path, 4), daemon=True)
    next_one.start()
    next_one.join(0.3)
    assert next_one.is_alive()
    gate.open()
    next_one.join(PATIENCE)
    writer.close()
    assert steps(store) == [1, 2, 3, 4]


def test_a_copy_is_made_in_the_background_and_may_fail(
    new_writer: Callable[..., CheckpointWriter], caplog: pytest.LogCaptureFixture
) -> None:
    writer = new_writer()
    threads: list[threading.Thread] = []

    def fails() -> None:
        raise StorageError("the store is away")

    writer.copy_in_background("first", fails)
    writer.copy_in_background("second", lambda: threads.append(threading.current_thread()))
    writer.close()
    assert threads
    assert threading.main_thread() not in threads
    assert "the store is away; the training continues" in caplog.text


@pytest.mark.parametrize("free", [0, 70, 500, 1000])  # at the archive's first bytes, within it, at its end
def test_a_full_disk_costs_one_checkpoint_and_says_what_it_needs(
    new_writer: Callable[..., CheckpointWriter],
    store: ObjectStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    free: int,
) -> None:
    """Of one rank, for all; files that the store has make room first."""
    put_on_disk(monkeypatch, lambda path: path.parent.name == "global_step2", lambda: Disk(free))
    told: list[str] = []
    first, second = new_writer(rank=0, world_size=2, on_disk=told.append), new_writer(rank=1, world_size=2)
    old = []
    for step in (1, 2, 3):
        old.append(save(first, tmp_path / "first", step, "b.pt"))
        save(second, tmp_path / ("second" if step != 2 else "first"), step, "a.pt")
        assert bool(first.wait()) == (step == 2)
        assert bool(second.wait()) == (step == 2)
    assert steps(store) == [1, 3]
    assert not old[0].exists()
    where = tmp_path / "first" / "global_step2"
    assert f"{where} is not saved: rank 0 needs 12 bytes (0.0 GB) there, and the disk has " in caplog.text
    assert "the training continues" in caplog.text
    assert [text[:20] for text in told] == ["", str(where)[:20], ""]


def test_a_disk_without_room_for_the_manifest_costs_the_local_copy_alone(
    new_writer: Callable[..., CheckpointWriter],
    store: ObjectStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    put_on_disk(monkeypatch, lambda path: MANIFEST_FILE in path.name, lambda: Disk(10))
    written: list[Manifest] = []
    writer = new_writer(written=written.append)
    folder = save(writer, tmp_path, 1).parent
    assert not writer.wait_for_disk(), "the store will have it"
    save(writer, tmp_path, 2, upload=False)
    problem = writer.wait_for_disk()
    writer.close()
    assert problem.startswith(f"{folder.with_name('global_step2') / MANIFEST_FILE} needs ")
    assert problem in caplog.text
    assert not written
    assert [path.name for path in folder.iterdir()] == ["state.pt"]
    assert steps(store) == [1]


@pytest.mark.parametrize("comes", [True, False])
def test_the_last_save_waits_for_room(
    new_writer: Callable[..., CheckpointWriter],
    store: ObjectStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    comes: bool,
) -> None:
    disk, told = Disk(100), list[str]()
    put_on_disk(monkeypatch, lambda path: path.name.startswith(".state.pt"), lambda: disk)
    monkeypatch.setattr(writer_module, "_LOOK_SECONDS", 0.05)

    def on_disk(problem: str) -> None:
        told.append(problem)
        disk.free = 10**6 if comes else 0

    writer = new_writer(on_disk=on_disk)
    writer._patience = 60.0 if comes else 0.2
    save(writer, tmp_path, 1, last=True)
    assert bool(writer.wait()) != comes
    assert steps(store) == ([1] if comes else [])
    assert ["global_step1 is not saved" in text for text in told] == ([True, False] if comes else [True, True])


def test_memory_is_used_again(new_writer: Callable[..., CheckpointWriter], tmp_path: Path) -> None:
    writer = new_writer()
    places = []
    for step in (1, 2):
        save(writer, tmp_path, step, value=float(step))
        places.append([buffer.data_ptr() for buffer in writer._buffers._buffers])
    writer.close()
    assert places[0] == places[1]
    assert writer._buffers.nbytes == 12
    values = [torch.load(tmp_path / f"global_step{step}" / "state.pt")["weight"][0].item() for step in (1, 2)]
    assert values == [1.0, 2.0]
