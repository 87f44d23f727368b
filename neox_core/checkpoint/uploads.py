"""A thread that brings checkpoints from local disk to the object store while training goes on."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from neox_core.artifact import FileRecord
from neox_core.checkpoint.manifest import MANIFEST_FILE, Manifest, checkpoint_step, object_key, publish_manifest
from neox_core.checkpoint.reports import Reports
from neox_core.errors import CheckpointError, StorageError
from neox_core.storage.object_store import ObjectStore
from neox_core.storage.patient_store import StoreGivenUp

logger = logging.getLogger(__name__)

_KEPT_LOCALLY = 2
_LOW_PRIORITY = 10
_LISTINGS = 3
"""Of files that are missing each time, before the checkpoint is called incomplete."""


@dataclass(frozen=True)
class LocalCheckpoint:
    """A checkpoint whose files lie on local disk."""

    serial: int
    """Number of the save in this job, the same on all ranks."""
    manifest: Manifest
    """On rank 0 with the files of all ranks."""
    folder: Path
    records: tuple[FileRecord, ...]
    """The files that this rank uploads."""
    problem: str = ""
    """Why this rank has no files, so that there is no such checkpoint."""


class Uploads:
    """Uploads one checkpoint after the other; one more may wait.

    While the store fails some rank, one that comes replaces the one that waits. Otherwise it waits for its place.

    Args:
        store: where to; it is what bears failures.
        prefix: key below which the checkpoints lie.
        rank: this rank; rank 0 publishes the manifests.
        reports: of all ranks.
        stopped: once it is set, an upload under way ends.
        heartbeat: called as an upload makes progress.
        may_publish: called on rank 0 before each manifest is published; raises if this job must not.
        published: called on rank 0 with each manifest that was published, in this thread.
        failed: called with what ended an upload for good; nothing is uploaded afterwards.
    """

    def __init__(
        self,
        store: ObjectStore,
        prefix: str,
        rank: int,
        reports: Reports,
        stopped: threading.Event,
        heartbeat: Callable[[], None],
        may_publish: Callable[[], None],
        published: Callable[[Manifest], None],
        failed: Callable[[Exception], None],
    ) -> None:
        self._store, self._prefix, self._rank, self._reports = store, prefix, rank, reports
        self._stopped, self._heartbeat, self._may_publish = stopped, heartbeat, may_publish
        self._published, self._failed = published, failed
        self._changed = threading.Condition()
        self._waiting: LocalCheckpoint | None = None
        self._copies: dict[str, Callable[[], None]] = {}
        self._busy = self._closed = False
        self._failure: Exception | None = None
        self._kept: list[LocalCheckpoint] = []
        self._thread = threading.Thread(target=self._run, name="upload", daemon=True)
        self._thread.start()

    def put(self, checkpoint: LocalCheckpoint) -> None:
        """Upload a checkpoint when its turn comes; returns when it waits, or at once after a failure."""
        with self._changed:
            while self._waiting and not self._failure and not self._reports.any_behind():
                self._changed.wait(0.1)
            if self._failure:
                return
            if self._waiting:
                self._replace(self._waiting, checkpoint)
            self._waiting = checkpoint
            self._changed.notify_all()

    def copy(self, name: str, copy: Callable[[], None]) -> None:
        """Call it before the next checkpoint; the last one of a name counts. A failure of the store is logged only."""
        with self._changed:
            self._copies[name] = copy
            self._changed.notify_all()

    def wait(self) -> None:
        """Wait until there is nothing left to upload.

        Raises:
            StorageError, CheckpointError, OSError: what ended an upload.
        """
        with self._changed:
            while (self._busy or self._waiting or self._copies) and not self._failure:
                self._changed.wait(0.5)
            if self._failure:
                raise self._failure

    def free_disk(self) -> bool:
        """Remove local files that the store has, which are kept for a quick resume. Whether there were any."""
        with self._changed:
            kept, self._kept = self._kept, []
        for checkpoint in kept:
            _remove(checkpoint)
        return any(checkpoint.records for checkpoint in kept)

    def close(self) -> None:
        """End the thread after what it is at."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        stand_back()
        while True:
            with self._changed:
                while not (self._closed or self._waiting or self._copies):
                    self._changed.wait()
                if self._closed or self._failure:
                    return
                copies, self._copies = self._copies, {}
                checkpoint, self._waiting = self._waiting, None
                self._busy = True
                self._changed.notify_all()
            try:
                for copy in copies.values():
                    self._copy(copy)
                if checkpoint:
                    self._upload(checkpoint)
            except Exception as error:  # whatever it is, the training must hear of it
                logger.error("%s", error)
                try:
                    self._failed(error)
                finally:  # last: who waits for the upload goes on with it
                    self._failure = error
            with self._changed:
                self._busy = False
                self._changed.notify_all()

    def _copy(self, copy: Callable[[], None]) -> None:
        try:
            copy()
        except StoreGivenUp:
            raise
        except StorageError as error:
            logger.warning("%s; the training continues", error)

    def _upload(self, checkpoint: LocalCheckpoint) -> None:
        started, manifest = time.monotonic(), checkpoint.manifest
        for record in checkpoint.records:
            path = checkpoint.folder / record.path
            self._store.put_file(path, object_key(self._prefix, manifest.name, record.path), self._progress)
        self._reports.tell(checkpoint.serial, "uploaded", checkpoint.problem)
        if self._rank == 0:
            if replaced := [text for text in self._reports.collect(checkpoint.serial, "uploaded") if text]:
                logger.warning("the checkpoint of step %d is not published: %s", manifest.step, replaced[0])
            else:
                self._publish(manifest)
                logger.info("checkpoint of step %d is complete after %.1f s", manifest.step, time.monotonic() - started)
                self._published(manifest)
            # Nor is an older one, which was replaced or given up, needed any more.
            for path in checkpoint.folder.parent.glob(f"*/{MANIFEST_FILE}"):
                step = checkpoint_step(path.parent.name)
                if step is not None and step <= manifest.step:
                    path.unlink(missing_ok=True)
        with self._changed:
            self._kept.append(checkpoint)
            old = [self._kept.pop(0) for _ in range(len(self._kept) - _KEPT_LOCALLY)]
            used = {other.folder for other in (*self._kept, self._waiting) if other}
        for kept in old:
            if kept.folder not in used:
                _remove(kept)  # else a training that went back has saved that step again

    def _progress(self, sent: int) -> None:
        """Some bytes went out."""
        self._heartbeat()
        if self._stopped.is_set():
            raise CheckpointError("stopped while files were being uploaded")

    def _publish(self, manifest: Manifest) -> None:
        self._may_publish()
        for attempt in range(1, _LISTINGS + 1):
            try:
                publish_manifest(self._store, self._prefix, manifest)
                return
            except CheckpointError as error:
                if attempt == _LISTINGS:
                    raise
                logger.warning("looking again: %s", error)
                time.sleep(1.0)

    def _replace(self, old: LocalCheckpoint, new: LocalCheckpoint) -> None:
        reason = f"the store is behind, and step {new.manifest.step} replaces step {old.manifest.step}"
        logger.warning("%s", reason)
        self._reports.tell(old.serial, "uploaded", reason)
        _remove(old)


def stand_back() -> None:
    """Let this thread's work wait for that of others, such as compute on CPUs."""
    with contextlib.suppress(OSError):  # Linux has a priority for each thread
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOW_PRIORITY)


def _remove(checkpoint: LocalCheckpoint) -> None:
    """Delete this rank's local files, the manifest first."""
    (checkpoint.folder / MANIFEST_FILE).unlink(missing_ok=True)
    for record in checkpoint.records:
        (checkpoint.folder / record.path).unlink(missing_ok=True)


def completed(manifest: Manifest, reports: list[tuple[FileRecord, ...]]) -> Manifest:
    """The manifest with the files that all ranks have reported."""
    records = sorted((record for own in reports for record in own), key=lambda record: record.path)
    return replace(manifest, files=tuple(records))
