"""The checkpoint writer against a real store: what is uploaded, when a checkpoint exists, and how failures surface."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from neox_core.checkpoint import writer as writer_module
from neox_core.checkpoint.manifest import Manifest, list_checkpoints
from neox_core.checkpoint.writer import CheckpointWriter
from neox_core.errors import CheckpointError, StorageError
from neox_core.storage.digest import sha256_of
from neox_core.storage.object_store import ObjectStore

PREFIX = "train-0123"
PATIENCE = 60.0
"""Seconds after which something hangs."""


def manifest(step: int) -> Manifest:
    return Manifest(step, 8 * step, files=(), layout={"tensor": 1}, fingerprint="0123", config={"name": "toy"})


@pytest.fixture
def new_writer(store: ObjectStore) -> Iterator[Callable[..., CheckpointWriter]]:
    """Makes writers, and ends their threads after the test whatever they do."""
    made: list[CheckpointWriter] = []
    channel = dist.HashStore()

    def make(rank: int = 0, world_size: int = 1, attempt: str = "now", store: ObjectStore = store) -> CheckpointWriter:
        made.append(CheckpointWriter(store, PREFIX, rank, world_size, attempt, channel))
        return made[-1]

    yield make
    for writer in made:
        writer._stop.set()
        writer._executor.shutdown()


def save(writer: CheckpointWriter, folder: Path, step: int, name: str = "state.pt", value: float = 1.0) -> Path:
    """Save one small file of a step."""
    path = folder / f"global_step{step}" / name
    writer.save(manifest(step), lambda take: take({"weight": torch.full((3,), value)}, path))
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


def waited_for_reports(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> Callable[[CheckpointWriter], bool]:
    """A function that waits until rank 0 has looked twice for reports, or is through; True if it is still waiting."""
    looked = threading.Semaphore(0)
    through = store.list

    def counting(prefix: str = "") -> Any:
        found = through(prefix)
        if "reports/" in prefix:
            looked.release()
        return found

    monkeypatch.setattr(store, "list", counting)

    def still_waiting(writer: CheckpointWriter) -> bool:
        pending = writer._pending
        assert pending is not None
        pending.add_done_callback(lambda _: looked.release(2))
        for _ in range(2):
            assert looked.acquire(timeout=PATIENCE)
        return not pending.done()

    return still_waiting


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
    writer.save(manifest(5), lambda take: take(state, path))
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

    writer.save(manifest(1), hand_over)
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
    new_writer: Callable[..., CheckpointWriter], store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    still_waiting = waited_for_reports(store, monkeypatch)
    first, second = new_writer(rank=0, world_size=2), new_writer(rank=1, world_size=2)
    save(first, tmp_path / "0", 1, "b.pt")
    assert still_waiting(first)
    assert steps(store) == []
    save(second, tmp_path / "1", 1, "a.pt", value=2.0)
    second.close()
    first.close()
    (found,) = list_checkpoints(store, PREFIX)
    assert [(record.path, record.sha256) for record in found.files] == [
        ("a.pt", sha256_of(tmp_path / "1/global_step1/a.pt")),
        ("b.pt", sha256_of(tmp_path / "0/global_step1/b.pt")),
    ]


def test_reports_of_a_dead_attempt_do_not_count(
    new_writer: Callable[..., CheckpointWriter], store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 1 of the dead job reported and rank 0 did not live to publish: its file must not enter the new manifest."""
    dead = new_writer(rank=1, world_size=2, attempt="dead")
    save(dead, tmp_path / "dead", 1, "a.pt", value=13.0)
    dead.close()
    still_waiting = waited_for_reports(store, monkeypatch)
    first, second = new_writer(0, 2, "new"), new_writer(1, 2, "new")
    save(first, tmp_path / "0", 1, "b.pt")
    assert still_waiting(first)
    assert steps(store) == []
    path = save(second, tmp_path / "1", 1, "a.pt", value=2.0)
    second.close()
    first.close()
    (found,) = list_checkpoints(store, PREFIX)
    assert {record.path: record.sha256 for record in found.files}["a.pt"] == sha256_of(path)
    assert len(found.files) == 2
    store.get_file(f"{PREFIX}/global_step1/a.pt", tmp_path / "fetched.pt")
    assert sha256_of(tmp_path / "fetched.pt") == sha256_of(path)


@pytest.mark.parametrize("surface", ["save", "wait", "close"])
def test_a_failed_upload_surfaces_and_the_checkpoint_does_not_exist(
    new_writer: Callable[..., CheckpointWriter],
    store: ObjectStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    surface: str,
) -> None:
    fail_upload(store, "bad.pt", monkeypatch)
    writer = new_writer()
    path = save(writer, tmp_path, 1, "bad.pt")
    action = {"save": lambda: save(writer, tmp_path, 2), "wait": writer.wait, "close": writer.close}[surface]
    with pytest.raises(StorageError, match=r"no space for train-0123/global_step1/bad.pt"):
        action()
    assert steps(store) == []
    assert path.is_file()
    writer.close()  # says it once, and does not hang


def test_training_may_go_on_after_a_failed_upload(
    new_writer: Callable[..., CheckpointWriter], store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_upload(store, "bad.pt", monkeypatch)
    writer = new_writer()
    save(writer, tmp_path, 1, "bad.pt")
    with pytest.raises(StorageError):
        writer.wait()
    save(writer, tmp_path, 2, "good.pt")
    writer.close()
    assert steps(store) == [2]


def test_rank_0_hears_of_another_ranks_failure_at_once(
    new_writer: Callable[..., CheckpointWriter], store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does not wait for the report that cannot come, and neither for the next checkpoint."""
    fail_upload(store, "bad.pt", monkeypatch)
    first, second = new_writer(rank=0, world_size=2), new_writer(rank=1, world_size=2)
    still_waiting = waited_for_reports(store, monkeypatch)
    save(first, tmp_path / "0", 1, "good.pt")
    assert still_waiting(first)
    first.check()
    save(second, tmp_path / "1", 1, "bad.pt")
    assert second._pending is not None
    assert first._pending is not None
    with pytest.raises(StorageError, match="no space"):
        second._pending.result(PATIENCE)
    with pytest.raises(StorageError, match="no space"):
        second.check()
    with pytest.raises(CheckpointError, match=r"not published, a file is missing: rank 1: no space for .*bad\.pt"):
        first._pending.result(PATIENCE)
    with pytest.raises(CheckpointError, match="not published"):
        first.check()
    assert steps(store) == []
    first.check()  # says it once


def test_an_upload_that_makes_progress_says_so(store: ObjectStore, tmp_path: Path) -> None:
    beats: list[int] = []
    writer = CheckpointWriter(store, PREFIX, 0, 1, "now", dist.HashStore(), lambda: beats.append(1))
    save(writer, tmp_path, 1)
    writer.close()
    assert len(beats) >= 2  # written, and sent


def test_a_rank_that_never_reports_is_an_error(
    new_writer: Callable[..., CheckpointWriter], store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer_module, "_REPORT_TIMEOUT_SECONDS", 0.0)
    writer = new_writer(rank=0, world_size=3)
    save(writer, tmp_path, 1)
    with pytest.raises(CheckpointError, match=r"only 1 of 3 ranks have uploaded .*global_step1"):
        writer.close()
    assert steps(store) == []


def test_an_interrupted_close_does_not_wait_for_other_ranks(
    new_writer: Callable[..., CheckpointWriter], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = new_writer(rank=0, world_size=2)
    save(writer, tmp_path, 1)

    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(writer, "wait", interrupted)
    raised: list[BaseException] = []

    def close() -> None:
        try:
            writer.close()
        except KeyboardInterrupt as error:
            raised.append(error)

    closing = threading.Thread(target=close, daemon=True)
    closing.start()
    closing.join(PATIENCE)
    assert not closing.is_alive()
    assert len(raised) == 1


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


def test_a_checkpoint_waits_for_the_one_before(
    new_writer: Callable[..., CheckpointWriter], store: ObjectStore, tmp_path: Path
) -> None:
    """Host memory holds one copy of the state, not one for every upload that is late."""
    writer = new_writer()
    gate = Gate(store, "put_file")
    taken: list[Any] = []
    save(writer, tmp_path, 1)
    assert gate.reached.wait(PATIENCE)
    next_one = threading.Thread(target=writer.save, args=(manifest(2), taken.append), daemon=True)
    next_one.start()
    next_one.join(0.3)
    assert (next_one.is_alive(), taken) == (True, [])
    gate.open()
    next_one.join(PATIENCE)
    assert (next_one.is_alive(), len(taken)) == (False, 1)
    assert 1 in steps(store)


def test_a_copy_is_made_in_the_background_and_may_fail(store: ObjectStore, caplog: pytest.LogCaptureFixture) -> None:
    writer = CheckpointWriter(store, PREFIX, 0, 1, "now", dist.HashStore())
    threads: list[threading.Thread] = []

    def fails() -> None:
        raise StorageError("the store is away")

    writer.copy_in_background(fails)
    writer.copy_in_background(lambda: threads.append(threading.current_thread()))
    writer.close()
    assert threads
    assert threading.main_thread() not in threads
    assert "the store is away; the training continues" in caplog.text
