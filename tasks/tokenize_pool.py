"""Parts made by worker processes of this machine, and how far they are."""

from __future__ import annotations

import logging
import multiprocessing
import os
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from neox_core.data.part import PartRecord, PartSettings, make_part
from neox_core.data.readers import InputFile
from neox_core.errors import DataError
from neox_core.progress import Progress

_log = logging.getLogger(__name__)

MadeParts = Iterator[tuple[InputFile, PartRecord]]
"""Each file and its part's record, as they are finished."""


def made_in_processes(files: Sequence[InputFile], settings: PartSettings, folder: Path, workers: int) -> MadeParts:
    """Make the files' parts, the largest first.

    Raises:
        DataError, ConfigError, StorageError: the first failure of a worker; finished parts are kept.
    """
    workers = min(workers, len(files))
    # spawn: a fork of a process with threads, which Prefect's is, may hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=end_with_parent) as pool:
        largest_first = sorted(files, key=lambda file: -file.size)
        futures = {pool.submit(make_part, file, settings, folder): file for file in largest_first}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool:
            raise DataError(
                f"a tokenizer process was killed, perhaps for want of memory: lower data.workers ({workers}) and run "
                "again; finished files are kept"
            ) from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def with_progress(made: MadeParts, files: Sequence[InputFile], progress: Progress) -> MadeParts:
    """Pass the parts on and tell files, MB of text and tokens per second, and the time left."""
    started, text_bytes, tokens, read = time.monotonic(), 0, 0, 0
    total = max(1, sum(file.size for file in files))
    progress(0.0, f"0 of {len(files)} files")
    for done, (file, record) in enumerate(made, start=1):
        text_bytes, tokens, read = text_bytes + record.bytes, tokens + record.tokens, read + file.size
        seconds = max(time.monotonic() - started, 1e-3)
        left = seconds * (total - read) / max(read, 1)
        speed = f"{text_bytes / seconds / 1e6:.1f} MB/s, {tokens / seconds / 1e6:.2f}M tokens/s"
        progress(read / total, f"{done} of {len(files)} files, {speed}, {_clock(left)} left")
        _log.info(
            "%s: %d documents, %d tokens, %d rejected", file.location, record.documents, record.tokens, record.rejected
        )
        yield file, record


def end_with_parent() -> None:
    """End this worker when its parent is killed; it would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "runs in a worker only"

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
