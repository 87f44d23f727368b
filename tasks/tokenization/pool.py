"""Parts made by worker processes of this machine."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

from neox_core.data.tokenization.part_settings import Done, PartRecord, PartSettings
from neox_core.data.tokenization.readers import InputFile
from neox_core.errors import DataError

MadeParts = Iterator[tuple[InputFile, PartRecord]]
"""Each file and its part's record, as they are finished."""


class Order(NamedTuple):
    """What the fork server is sent. It answers with (place in `files`, record) for each, with Done in between, and with
    an exception at last if there was one."""

    files: tuple[InputFile, ...]
    settings: PartSettings
    folder: Path
    workers: int


def made_in_processes(
    files: Sequence[InputFile],
    settings: PartSettings,
    folder: Path,
    workers: int,
    on_progress: Callable[[Done], None] = lambda done: None,
) -> MadeParts:
    """Make the files' parts, the largest first, in worker processes that end with this one.

    Args:
        on_progress: called a few times per second with what the workers have made by now; parts found are not in it.

    Raises:
        DataError, ConfigError, StorageError: the first failure of a worker; finished parts are kept.
    """
    order = Order(tuple(files), settings, folder, min(workers, len(files)))
    made = 0
    with _fork_server() as connection:
        try:
            connection.send(order)
            while True:
                answer = connection.recv()
                if isinstance(answer, Exception):
                    raise answer
                if isinstance(answer, Done):
                    on_progress(answer)
                else:
                    place, record = answer
                    made += 1
                    yield order.files[place], record
        except (EOFError, ConnectionError):  # it has ended
            pass
    if made < len(files):
        raise killed(order.workers)


def killed(workers: int) -> DataError:
    """The error for a process that has ended without a word."""
    return DataError(
        f"a tokenizer process was killed, perhaps for want of memory: lower data.workers ({workers}) and run again; "
        "finished files are kept"
    )


@contextmanager
def _fork_server() -> Iterator[Connection]:
    """Start the fork server (fork_server.py); it ends with its work, or when the connection to it is closed."""
    ours, theirs = multiprocessing.Pipe()
    code = (
        f"import gc, sys; gc.disable(); sys.path[:] = {sys.path!r}; "
        f"from tasks.tokenization.fork_server import main; main({theirs.fileno()})"
    )
    # A session of its own: Ctrl-C is for this process alone, with which the fork server and its workers end.
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
