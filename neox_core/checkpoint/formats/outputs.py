"""A checkpoint's files written side by side, each whole or not at all; an interrupted attempt is continued."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Event, Lock
from typing import Any

import torch

from neox_core.artifact import FileRecord
from neox_core.errors import CheckpointError
from neox_core.progress import Progress
from neox_core.storage.folders import Folder
from neox_core.storage.s3_target import Put
from neox_core.storage.targets import LocalTarget, Target
from neox_core.storage.tensor_writer import Sink, StreamedTensor, write_safetensors, write_torch

JOURNAL_FILE = ".conversion.json"
"""Which files are finished; a memory of the attempt, not a part of its result."""
_WORKERS = 4
"""Files at a time."""
_POLL_SECONDS = 0.5
_WORTH_A_THREAD = 1 << 16
_BYTES_PER_TENSOR = 1024
"""At most, for names, headers and alignment."""


@dataclass(frozen=True)
class OutputFile:
    """A file to write: torch's archive, or safetensors where its name says so."""

    path: str
    """Relative to the target's folder."""
    tensors: Sequence[StreamedTensor]
    under: str | None = None
    """torch's archive only: the key that holds the named tensors."""

    @property
    def size(self) -> int:
        """Bytes, rounded up."""
        return sum(tensor.nbytes + _BYTES_PER_TENSOR for tensor in self.tensors)

    def write(self, sink: Sink, pool: Executor) -> None:
        """Compute the tensors in the pool's threads and write them."""
        if self.path.endswith(".safetensors"):
            write_safetensors(sink, self.tensors, pool)
        else:
            write_torch(sink, self.tensors, pool, self.under)


@dataclass
class Meter:
    """What an attempt has done, seen from several threads."""

    total: int
    done: int = 0
    kept: int = 0
    """Of `done`: written by an earlier attempt."""
    started: float = field(default_factory=time.monotonic)
    stop: Event = field(default_factory=Event)
    lock: Lock = field(default_factory=Lock)

    def add(self, count: int) -> None:
        """Count bytes; raises in every thread when the attempt is to end."""
        if self.stop.is_set():
            raise CheckpointError("stopped, because another file failed")
        with self.lock:
            self.done += count

    def report(self, progress: Progress) -> None:
        """Tell how far it is: bytes, bytes/s and the time left."""
        seconds = max(time.monotonic() - self.started, 1e-3)
        rate = (self.done - self.kept) / seconds
        left = (self.total - self.done) / rate if rate > 0 else 0.0
        text = f"{self.done / 1e9:.2f} of {self.total / 1e9:.2f} GB, {rate / 1e6:.0f} MB/s, {max(left, 0):.0f} s left"
        progress(min(self.done / max(self.total, 1), 0.999), text)


class HashedSink:
    """Bytes on their way to a file. A large piece is hashed and written by threads while the caller makes the next.

    A piece must stay valid until `write` has returned for the next one, or `flush` has been called.
    """

    def __init__(self, put: Put, meter: Meter, threads: Executor) -> None:
        self._put, self._meter, self._threads = put, meter, threads
        self._pending: list[Future[None]] = []
        self.digest = hashlib.sha256()
        self.size = 0

    def write(self, data: Any, /) -> int:
        """Append a buffer."""
        view = memoryview(data).cast("B")
        self._meter.add(len(view))
        self.flush()
        if len(view) < _WORTH_A_THREAD:
            self.digest.update(view)
            self._put(view)
        else:
            self._pending = [self._threads.submit(work, view) for work in (self.digest.update, self._put)]
        self.size += len(view)
        return len(view)

    def flush(self) -> None:
        """Wait until everything is hashed and written; raises what kept it from that."""
        pending, self._pending = self._pending, []
        for future in pending:
            future.result()


def finished_files(target: Target, identity: str, files: Sequence[OutputFile]) -> dict[str, FileRecord]:
    """Files of an earlier attempt at the same result that are as they were written."""
    try:
        journal = read_journal(target)
        if journal["identity"] != identity:
            return {}
        records = {path: FileRecord(**record) for path, record in journal["files"].items()}
        marks = dict(journal["marks"])
    except (OSError, ValueError, TypeError, KeyError):
        return {}
    wanted = {file.path for file in files} & records.keys()
    return {path: records[path] for path in wanted if marks.get(path) == target.mark(path)}


def journal_records(target: Target) -> list[FileRecord]:
    """What the last conversion to `target` wrote: sizes and SHA-256, so that nobody has to read it for them."""
    return [FileRecord(**record) for record in read_journal(target)["files"].values()]


def read_journal(target: Folder) -> dict[str, Any]:
    """What is known of the last attempt: `identity`, the `planned` paths, `files` and `marks`; empty: nothing."""
    try:
        journal = json.loads(target.read_text(JOURNAL_FILE))
    except (OSError, ValueError):
        return {}
    return journal if isinstance(journal, dict) else {}


@dataclass
class Journal:
    """Keeps what is finished, for a next attempt."""

    target: Target
    identity: str
    planned: Sequence[str]
    """Every file of the result, so that what a killed attempt leaves is known as its own."""
    records: dict[str, FileRecord]
    marks: dict[str, str]

    def note(self, record: FileRecord) -> None:
        """A file is finished."""
        self.records[record.path] = record
        local = isinstance(self.target, LocalTarget)  # whose mark is known without reading the file again
        self.marks[record.path] = record.sha256 if local else self.target.mark(record.path)
        self.save()

    def save(self) -> None:
        """Write it."""
        content = {
            "identity": self.identity,
            "planned": list(self.planned),
            "files": {path: vars(known) for path, known in self.records.items()},
            "marks": self.marks,
        }
        self.target.write(JOURNAL_FILE, json.dumps(content, indent=1).encode())


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Threads that begin in the block compute on one core each: files and chunks are what runs side by side."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def write_files(
    target: Target,
    identity: str,
    files: Sequence[OutputFile],
    progress: Progress,
    finished: Mapping[str, FileRecord],
    others: Sequence[str] = (),
) -> list[FileRecord]:
    """Write the files that are not `finished`, several at a time, each in pieces of some megabytes.

    `others` are paths that the caller will write.

    Raises:
        CheckpointError: a tensor cannot be made. Finished files stay for the next attempt; others leave nothing.
        StorageError: the disk is too small, which is found out before anything is written.
    """
    target.remove_remains([file.path for file in files])
    records = dict(finished)
    planned = [*(file.path for file in files), *others]
    journal = Journal(target, identity, planned, records, {path: target.mark(path) for path in records})
    missing = [file for file in files if file.path not in records]
    target.check_space(sum(file.size for file in missing))
    journal.save()
    kept = sum(record.size for record in records.values())
    meter = Meter(total=kept + sum(file.size for file in missing), done=kept, kept=kept)
    files_at_once = min(_WORKERS, os.cpu_count() or 1)
    with (
        _one_thread_each(),
        ThreadPoolExecutor(2 * files_at_once) as fillers,
        ThreadPoolExecutor(files_at_once) as pool,
    ):
        futures = [pool.submit(_write, target, file, meter, fillers) for file in missing]
        try:
            _follow(futures, journal.note, meter, progress)
        except BaseException:
            meter.stop.set()
            pool.shutdown(cancel_futures=True)
            raise
    return [records[file.path] for file in files]


def _write(target: Target, file: OutputFile, meter: Meter, fillers: Executor) -> FileRecord:
    # The threads end before the file is closed.
    with target.create(file.path, file.size) as put, ThreadPoolExecutor(2) as threads:
        sink = HashedSink(put, meter, threads)
        file.write(sink, fillers)
        sink.flush()
    return FileRecord(file.path, sink.size, sink.digest.hexdigest())


def _follow(
    futures: list[Future[FileRecord]], done: Callable[[FileRecord], None], meter: Meter, progress: Progress
) -> None:
    """Report until all files are written, or the first error."""
    pending = set(futures)
    while pending:
        finished, pending = wait(pending, timeout=_POLL_SECONDS, return_when=FIRST_COMPLETED)
        failures = [future for future in finished if future.exception()]
        for future in finished:
            if future not in failures:
                done(future.result())
        for future in failures:
            future.result()
        meter.report(progress)
