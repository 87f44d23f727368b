"""What a rank leaves in its submission's folder: its result or its failure; and the end of its log."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from submitit.core.utils import UncompletedJobError, cloudpickle_dump, pickle_load, temporary_save_path

from neox_core.errors import CheckpointError, ConfigError, DataError, LaunchError, LlemmaError, TrainingError
from neox_core.storage.atomic import write_atomically

_REFUSALS = (ConfigError, DataError, CheckpointError, LaunchError, TrainingError)
"""A store that cannot be reached is no refusal: later it may."""


@dataclass(frozen=True)
class RankFailure:
    """The exception that ended a rank; `time` in unix seconds."""

    rank: int
    time: float
    message: str
    cause: Literal["timeout", "preempted"] | None = None
    """If it is what a signal of the scheduler announced."""
    refused: bool = False
    """The program would not go on with what it was given, so that another attempt would end likewise."""
    decided: bool = False
    """The program ended itself, with a reason; else it crashed."""


def result_file(folder: Path, index: int, rank: int) -> Path:
    """Where what a rank returned is recorded."""
    return folder / f"task_{index}_rank_{rank}_result.pkl"


def write_result(folder: Path, index: int, rank: int, result: Any) -> None:
    """Record what a rank returned."""
    with temporary_save_path(result_file(folder, index, rank)) as temporary:
        cloudpickle_dump(result, temporary)


def read_result(folder: Path, index: int, rank: int) -> Any:
    """What a rank returned.

    Raises:
        FileNotFoundError: it has not returned.
    """
    return pickle_load(result_file(folder, index, rank))


def read_failure(folder: Path, index: int, rank: int) -> RankFailure | None:
    """The rank's failure, if it recorded one."""
    try:
        return RankFailure(**json.loads(_failure_file(folder, index, rank).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None


def write_failure(folder: Path, index: int, rank: int, error: BaseException) -> None:
    """Record an exception in one line."""
    message = " ".join(str(error).split())
    cause: Literal["timeout", "preempted"] | None = None
    if isinstance(error, UncompletedJobError):  # raised by submitit's signal handler, which says which of the two it is
        cause = "preempted" if "preempted" in message else "timeout"
    elif not isinstance(error, LlemmaError):
        message = f"{type(error).__name__}: {message}"
    decided = cause is not None or isinstance(error, LlemmaError)
    failure = RankFailure(rank, time.time(), message, cause, isinstance(error, _REFUSALS), decided)
    write_atomically(_failure_file(folder, index, rank), json.dumps(asdict(failure)))


def forget(folder: Path, index: int, rank: int) -> None:
    """Remove what an earlier life of the rank has left."""
    _failure_file(folder, index, rank).unlink(missing_ok=True)
    result_file(folder, index, rank).unlink(missing_ok=True)


def _failure_file(folder: Path, index: int, rank: int) -> Path:
    return folder / f"task_{index}_rank_{rank}_failure.json"


def last_words(log: Path) -> str:
    """The end of a rank's log, in a line."""
    try:
        lines = log.read_text(errors="replace").split("\n")
    except FileNotFoundError:
        return "none"
    return " | ".join(line.strip() for line in lines if line.strip())[-500:] or "none"
