"""Saves and uploads checkpoints while training continues.

Each rank's files are copied to host memory, while training waits. A thread then writes, hashes and uploads them; no
rank waits for another. When all ranks have reported their files to the store, rank 0 publishes the manifest, and only
then does the checkpoint exist. A rank that fails reports that to rank 0, which ends the job.
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from neox_core.artifact import FileRecord
from neox_core.checkpoint.manifest import Manifest, checkpoint_key, publish_manifest
from neox_core.errors import CheckpointError, StorageError
from neox_core.storage.atomic import atomic_file, remove_remains
from neox_core.storage.digest import sha256_of
from neox_core.storage.object_store import ObjectStore

logger = logging.getLogger(__name__)

_REPORT_TIMEOUT_SECONDS = 3600.0
_KEPT_LOCALLY = 2

TakeFile = Callable[[Any, Path], None]
"""Takes one file's content, nested containers with tensors, and its path."""


class CheckpointWriter:
    """Takes one rank's files of every checkpoint.

    Args:
        store: where checkpoints go.
        prefix: key below which `global_stepN/` lies.
        rank: this rank.
        world_size: number of ranks whose reports make a checkpoint complete.
        attempt: an id that all ranks of this job share and no other job has; reports of a job that died are ignored.
        channel: a torch.distributed store of all ranks, for word of a failure: the object store may be what fails.
        heartbeat: called as an upload makes progress.
    """

    def __init__(
        self,
        store: ObjectStore,
        prefix: str,
        rank: int,
        world_size: int,
        attempt: str,
        channel: Any,
        heartbeat: Callable[[], None] = lambda: None,
    ) -> None:
        self._channel, self._heartbeat = channel, heartbeat
        self._store, self._prefix, self._attempt = store, prefix, attempt
        self._rank, self._world_size = rank, world_size
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._saved: list[list[Path]] = []
        self._stop = threading.Event()

    def save(self, manifest: Manifest, hand_over: Callable[[TakeFile], None]) -> None:
        """Copy this rank's files to host memory and start to upload them; then training may change the tensors.

        Args:
            manifest: of the checkpoint. Rank 0 fills in `files`, from all ranks' reports.
            hand_over: gives each file to the function that it is called with.

        Raises:
            StorageError, CheckpointError: the checkpoint before failed.
        """
        self.wait()  # host memory holds one copy of the state only
        staged: list[tuple[Any, Path]] = []
        hand_over(lambda content, path: staged.append((_to_host(content), path)))
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.synchronize()  # for the copies
        self._pending = self._executor.submit(self._write, staged, manifest)

    def copy_in_background(self, copy: Callable[[], None]) -> None:
        """Call it in the thread of the uploads. A failure is logged only: the next checkpoint brings another copy."""

        def attempt() -> None:
            try:
                copy()
            except StorageError as error:
                logger.warning("%s; the training continues", error)

        self._executor.submit(attempt)

    def wait(self) -> None:
        """Wait until the last upload is through.

        Raises:
            StorageError, CheckpointError: it failed.
        """
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def check(self) -> None:
        """Raise what `wait` would, if the upload under way has failed already; costs nothing otherwise."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def close(self) -> None:
        """Finish the upload under way and stop the thread."""
        try:
            self.wait()
        finally:
            self._stop.set()
            self._executor.shutdown()

    def _write(self, staged: list[tuple[Any, Path]], manifest: Manifest) -> None:
        started = time.monotonic()
        key = f"{self._prefix}/{checkpoint_key(manifest.step)}"
        reports = f"{key}/reports/{self._attempt}/"
        try:
            records = [self._write_file(content, path, key) for content, path in staged]
            report = json.dumps([asdict(record) for record in records])
            self._store.put_text(f"{reports}rank_{self._rank}.json", report)
        except Exception as error:  # passed on, and reported to rank 0, which would wait for this rank
            with contextlib.suppress(RuntimeError):  # rank 0, which holds the channel, may be gone
                self._channel.compare_set(reports, "", f"rank {self._rank}: {error}")
            raise
        if self._rank == 0:
            files = self._collect_reports(reports)
            publish_manifest(self._store, self._prefix, replace(manifest, files=files))
            logger.info("checkpoint of step %d is complete after %.1f s", manifest.step, time.monotonic() - started)
        self._forget_old([path for _, path in staged])

    def _write_file(self, content: Any, path: Path, key: str) -> FileRecord:
        _save_atomically(content, path)
        self._heartbeat()
        record = FileRecord(path.name, path.stat().st_size, sha256_of(path))
        self._store.put_file(path, f"{key}/{path.name}", lambda _: self._heartbeat())
        return record

    def _collect_reports(self, prefix: str) -> tuple[FileRecord, ...]:
        """Files of all ranks, once every rank has reported."""
        deadline = time.monotonic() + _REPORT_TIMEOUT_SECONDS
        while len(reports := self._store.list(prefix)) < self._world_size:
            if self._channel.check([prefix]):
                raise CheckpointError(f"not published, a file is missing: {self._channel.get(prefix).decode()}")
            if time.monotonic() > deadline or self._stop.wait(0.5):
                raise CheckpointError(
                    f"only {len(reports)} of {self._world_size} ranks have uploaded their files to {prefix} after "
                    f"{_REPORT_TIMEOUT_SECONDS:.0f} s: look for errors in the other ranks' logs"
                )
        texts = [self._store.get_text(report.key) for report in reports]
        records = [FileRecord(**record) for text in texts for record in json.loads(text or "[]")]
        self._store.delete([report.key for report in reports])
        return tuple(sorted(records, key=lambda record: record.path))

    def _forget_old(self, paths: list[Path]) -> None:
        """Delete this rank's local files of older checkpoints, which the store holds."""
        self._saved.append(paths)
        while len(self._saved) > _KEPT_LOCALLY:
            for path in self._saved.pop(0):
                path.unlink(missing_ok=True)


def _save_atomically(content: Any, path: Path) -> None:
    remove_remains(path)
    # To a stream, as a name would be written into the file.
    with atomic_file(path) as temporary, temporary.open("wb") as file:
        torch.save(content, file)


def _to_host(value: Any) -> Any:
    """Copy all tensors in nested containers to host memory, where a copy from the GPU runs asynchronously."""
    if isinstance(value, torch.Tensor):
        if value.device.type == "cpu":
            return value.detach().clone()
        return torch.empty(value.shape, dtype=value.dtype, pin_memory=True).copy_(value.detach(), non_blocking=True)
    if isinstance(value, dict):
        return type(value)((key, _to_host(item)) for key, item in value.items())
    if type(value) in (list, tuple):
        return type(value)(_to_host(item) for item in value)
    return value
