"""Parts made by worker processes of this machine, and how far they are."""

from __future__ import annotations

import logging
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

from neox_core.data.part_settings import PartRecord, PartSettings
from neox_core.data.readers import InputFile
from neox_core.errors import DataError
from neox_core.progress import Progress

_log = logging.getLogger(__name__)

MadeParts = Iterator[tuple[InputFile, PartRecord]]
"""Each file and its part's record, as they are finished."""


class Order(NamedTuple):
    """What the foreman is sent. He answers with (place in `files`, record) for each, or with an exception at last."""

    files: tuple[InputFile, ...]
    settings: PartSettings
    folder: Path
    workers: int


def made_in_processes(files: Sequence[InputFile], settings: PartSettings, folder: Path, workers: int) -> MadeParts:
    """Make the files' parts, the largest first, in worker processes that end with this one.

    Raises:
        DataError, ConfigError, StorageError: the first failure of a worker; finished parts are kept.
    """
    order = Order(tuple(sorted(files, key=lambda file: -file.size)), settings, folder, min(workers, len(files)))
    made = 0
    with _foreman() as connection:
        connection.send(order)
        try:
            while True:
                answer = connection.recv()
                if isinstance(answer, Exception):
                    raise answer
                place, record = answer
                made += 1
                yield order.files[place], record
        except (EOFError, ConnectionError):  # he has ended
            pass
    if made < len(files):
        raise DataError(
            f"a tokenizer process was killed, perhaps for want of memory: lower data.workers ({workers}) and run "
            "again; finished files are kept"
        )


@contextmanager
def _foreman() -> Iterator[Connection]:
    """Start a foreman (tasks/tokenize_foreman.py); he ends with his work, or when the connection to him is closed."""
    ours, theirs = multiprocessing.Pipe()
    code = (
        f"import gc, sys; gc.disable(); sys.path[:] = {sys.path!r}; "
        f"from tasks.tokenize_foreman import main; main({theirs.fileno()})"
    )
    # A session of its own: Ctrl-C is for this process alone, with which the foreman and his workers end.
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", code],
        pass_fds=[theirs.fileno()],
        # numpy's BLAS, which nothing here calls, would start threads, and start them again in every fork.
        env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )
    theirs.close()
    try:
        with ours:
            yield ours
    finally:
        process.wait()


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


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
