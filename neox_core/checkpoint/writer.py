"""Saves checkpoints while training continues: to host memory, from there to local disk, and from there to the store.

Each rank's files are copied to host memory, which is reused: on GPUs during the next step, on CPUs while training
waits. A thread, which stands back behind the compute, then writes and hashes them; when all ranks
have done so, rank 0 writes the manifest next to them, and the checkpoint exists on local disk. Another thread uploads
the files; when all ranks have done that, rank 0 publishes the manifest, and the checkpoint exists in the store.
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from neox_core.artifact import FileRecord
from neox_core.checkpoint.host_memory import HostBuffers
from neox_core.checkpoint.manifest import MANIFEST_FILE, Manifest
from neox_core.checkpoint.reports import Reports, Stage
from neox_core.checkpoint.uploads import LocalCheckpoint, Uploads, completed, stand_back
from neox_core.storage.atomic import atomic_file, remove_remains, write_atomically
from neox_core.storage.digest import sha256_of
from neox_core.storage.full_disk import is_full, room_wanted
from neox_core.storage.object_store import ObjectStore

logger = logging.getLogger(__name__)

_REPORT_TIMEOUT_SECONDS = 3600.0
"""For which a rank's report may be missing, beyond what the store may be away."""
_LOOK_SECONDS = 5.0
"""Between two tries of a last save on a full disk."""


@dataclass(frozen=True)
class StagedFile:
    """A file's content in host memory."""

    content: Any
    path: Path
    copied: torch.cuda.Event | None
    """When it is all there."""


TakeFile = Callable[[Any, Path], None]
"""Takes one file's content, nested containers with tensors, and its path."""


class CheckpointWriter:
    """Takes one rank's files of every checkpoint.

    Args:
        store: where checkpoints go; it bears failures of its own.
        prefix: key below which the checkpoints lie.
        rank: this rank.
        world_size: number of ranks whose reports make a checkpoint complete.
        channel: a torch.distributed store that the ranks of this job share, and no others.
        heartbeat: called as an upload makes progress.
        stopped: once it is set, nothing waits any more.
        may_publish: called on rank 0, in a thread, before each manifest is published; raises if this job must not.
        published: called on rank 0, in a thread, with each manifest that was published.
        written: called on rank 0, in a thread, with each manifest of a checkpoint that is whole on local disk.
        on_disk: called, in a thread, after each save, with why the disk had no room for this rank's files; or "".
        failed: called, in a thread, with what ended the saving for good.
    """

    def __init__(
        self,
        store: ObjectStore,
        prefix: str,
        rank: int,
        world_size: int,
        channel: Any,
        heartbeat: Callable[[], None] = lambda: None,
        stopped: threading.Event | None = None,
        may_publish: Callable[[], None] = lambda: None,
        published: Callable[[Manifest], None] = lambda _: None,
        failed: Callable[[Exception], None] = lambda _: None,
        written: Callable[[Manifest], None] = lambda _: None,
        on_disk: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._rank, self._heartbeat, self._tell_failed, self._written = rank, heartbeat, failed, written
        self._on_disk = on_disk
        self._stop = stopped or threading.Event()
        self._patience = 60 * store.config.patience_minutes
        timeout = _REPORT_TIMEOUT_SECONDS + self._patience
        self.reports = Reports(channel, rank, world_size, self._stop, timeout)
        self._uploads = Uploads(
            store,
            prefix,
            rank,
            self.reports,
            self._stop,
            heartbeat,
            may_publish,
            published,
            partial(self._failed, "uploaded"),
        )
        self._buffers = HostBuffers()
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint", initializer=stand_back)
        self._writing: Future[str] | None = None
        self._problem = ""
        self._saves = 0

    def save(
        self,
        manifest: Manifest,
        hand_over: Callable[[TakeFile], None],
        folder: Path,
        upload: bool = True,
        last: bool = False,
    ) -> None:
        """Copy this rank's files to host memory and start to write them; then training may change the tensors.

        Args:
            manifest: of the checkpoint. Rank 0 fills in `files`, from all ranks' reports.
            hand_over: gives each file to the function that it is called with.
            folder: the checkpoint's own, where the files go.
            upload: False: it stays on local disk.
            last: no other save can take its place, so that on a full disk it waits for room, for
                `storage.patience_minutes`.

        Raises:
            CheckpointError, OSError: the checkpoint before could not be written to local disk.
        """
        self.wait_for_disk()  # host memory holds one copy of the state only
        self._buffers.begin()
        staged: list[StagedFile] = []
        hand_over(lambda content, path: staged.append(StagedFile(self._buffers.copy(content), path, _copied())))
        self._saves += 1
        self._writing = self._executor.submit(self._write, staged, manifest, folder, self._saves, upload, last)

    def upload(self, manifest: Manifest, folder: Path, records: tuple[FileRecord, ...]) -> None:
        """Upload a checkpoint that lies on local disk. On all ranks, each with the files that are its to upload."""
        self._saves += 1
        self._uploads.put(LocalCheckpoint(self._saves, manifest, folder, records))

    def copy_in_background(self, name: str, copy: Callable[[], None]) -> None:
        """Call it in the thread of the uploads, in place of one of that name that has not had its turn.

        A failure is logged only: the next checkpoint brings another copy.
        """
        self._uploads.copy(name, copy)

    def wait_for_disk(self) -> str:
        """Wait until the last save is on local disk.

        Returns:
            Why it is not, of a disk that was full; empty if it is.

        Raises:
            CheckpointError, OSError: it could not be written for another reason.
        """
        if self._writing is not None:
            writing, self._writing = self._writing, None
            self._problem = writing.result()
        return self._problem

    def wait(self) -> str:
        """Wait until the last save is in the store.

        Returns:
            As `wait_for_disk`.

        Raises:
            StorageError, CheckpointError, OSError: it is not, and will not be.
        """
        problem = self.wait_for_disk()
        self._uploads.wait()
        return problem

    def close(self) -> None:
        """Finish what is under way and stop the threads.

        Raises:
            StorageError, CheckpointError, OSError: as `wait`.
        """
        try:
            self.wait()
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Stop the threads; nothing that they wait for is waited for any more."""
        self._stop.set()
        self._executor.shutdown()
        self._uploads.close()

    def _failed(self, stage: Stage, error: Exception) -> None:
        with contextlib.suppress(RuntimeError):  # rank 0, which may hold the channel, may be gone
            self.reports.give_up(stage, str(error))
            self._tell_failed(error)

    def _write(
        self, staged: list[StagedFile], manifest: Manifest, folder: Path, serial: int, upload: bool, last: bool
    ) -> str:
        """The problem, if the disk is full: then there is no such checkpoint, and training goes on."""
        unnamed = ""
        try:
            records, problem = self._write_or_explain(staged, folder, self._patience if last else 0.0)
            self._on_disk(problem)
            self.reports.tell(serial, "written", json.dumps(problem or [asdict(record) for record in records]))
            if self._rank == 0:
                reports = [json.loads(text) for text in self.reports.collect(serial, "written")]
                problem = problem or next((found for found in reports if isinstance(found, str)), "")
                if not problem:
                    manifest = completed(manifest, [tuple(FileRecord(**r) for r in found) for found in reports])
                    unnamed = self._name(manifest, folder)
        except Exception as error:  # all ranks must hear of it
            self._failed("written", error)
            raise
        if upload:
            self._uploads.put(LocalCheckpoint(serial, manifest, folder, records, problem))
        return problem or ("" if upload else unnamed)

    def _name(self, manifest: Manifest, folder: Path) -> str:
        """Write the manifest next to its files. The problem, if that finds no room: the store may have them yet."""
        path, text = folder / MANIFEST_FILE, manifest.to_json()
        try:
            write_atomically(path, text)
            self._written(manifest)
        except OSError as error:
            if not is_full(error):
                raise
            problem = f"{path} {room_wanted(path, len(text))}: free some"
            logger.error("%s; the training continues", problem)
            return problem
        return ""

    def _write_or_explain(
        self, staged: list[StagedFile], folder: Path, patience: float
    ) -> tuple[tuple[FileRecord, ...], str]:
        """All files; or none, and why, if they do not fit even where older ones have made room and in those seconds."""
        deadline, problem = time.monotonic() + patience, ""
        while True:
            try:
                return tuple(self._write_file(file) for file in staged), ""
            except OSError as error:
                if not is_full(error):
                    raise
            for file in staged:
                file.path.unlink(missing_ok=True)
            if self._uploads.free_disk():
                continue
            if not problem:
                wanted = f"rank {self._rank} {room_wanted(folder, self._buffers.nbytes)}"
                problem = f"{folder} is not saved: {wanted}: free some, or name another launch.scratch"
                logger.error("%s; %s", problem, "this last save waits for it" if patience else "the training continues")
                if patience:
                    self._on_disk(problem)
            if time.monotonic() > deadline or self._stop.wait(min(_LOOK_SECONDS, patience)):
                return (), problem
            self._heartbeat()

    def _write_file(self, file: StagedFile) -> FileRecord:
        if file.copied is not None:
            file.copied.synchronize()
        _save_atomically(file.content, file.path)
        self._heartbeat()
        return FileRecord(file.path.name, file.path.stat().st_size, sha256_of(file.path))


def _save_atomically(content: Any, path: Path) -> None:
    remove_remains(path)
    # To a stream, as a name would be written into the file.
    with atomic_file(path) as temporary, temporary.open("wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # torch closed its archive after that, which failed as well
                raise error.__context__ from None
            raise


def _copied() -> torch.cuda.Event | None:
    """When the current stream has copied what it was given so far; None: at once."""
    return torch.cuda.current_stream().record_event() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]
