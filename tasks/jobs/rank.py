"""What one rank of a job runs: its environment, the function, and a record of what it returned or how it failed."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import submitit
from submitit.core.utils import UncompletedJobError, cloudpickle_dump, pickle_load, temporary_save_path

from neox_core.errors import (
    GO_ON_EXIT_CODE,
    CheckpointError,
    ConfigError,
    DataError,
    LaunchError,
    LlemmaError,
    StoppedError,
    TrainingError,
)
from neox_core.storage.atomic import write_atomically

_REFUSALS = (ConfigError, DataError, CheckpointError, LaunchError, TrainingError)
"""A store that cannot be reached is no refusal: later it may."""
CONTROLLER_VARIABLE = "LLEMMA_CONTROLLER_PID"
"""Of the local controller that started the rank."""


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


@dataclass(frozen=True)
class RankTask:
    """A function to be called in every rank, with torchrun's variables in the environment (RANK, WORLD_SIZE, ...)."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    folder: Path
    """Of the submission, where results and failures are recorded."""
    index: int = 0
    """Among the submission's tasks."""
    local_port: int | None = None
    """Where the ranks of a job on this machine meet; None: on SLURM, where it follows from the job's id."""

    def __call__(self) -> None:
        """Run the function in this rank of a submitit job."""
        environment = submitit.helpers.TorchDistributedEnvironment()
        environment.export(set_cuda_visible_devices=False, overwrite=True)
        if self.local_port is not None:
            # The host's name need not resolve on a laptop, and nobody else is to be reached.
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(self.local_port))
            _end_with_controller()
        self.run(environment.rank)

    def run(self, rank: int) -> None:
        """Run the function in this rank, whose environment is there, and record what it returns.

        Raises:
            BaseException: whatever the function raised, after it was recorded; SystemExit with the code that says
                'go on' for a StoppedError.
        """
        _failure_file(self.folder, self.index, rank).unlink(missing_ok=True)  # of a time before a requeue
        try:
            result = self.function(*self.args)
        except BaseException as error:  # recorded, not handled: KeyboardInterrupt and SystemExit end a rank too
            _write_failure(self.folder, self.index, rank, error)
            if isinstance(error, StoppedError):
                sys.exit(GO_ON_EXIT_CODE)
            raise
        with temporary_save_path(result_file(self.folder, self.index, rank)) as temporary:
            cloudpickle_dump(result, temporary)


def result_file(folder: Path, index: int, rank: int) -> Path:
    """Where what a rank returned is recorded."""
    return folder / f"task_{index}_rank_{rank}_result.pkl"


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


def _write_failure(folder: Path, index: int, rank: int, error: BaseException) -> None:
    """Record an exception in one line."""
    message = " ".join(str(error).split())
    cause: Literal["timeout", "preempted"] | None = None
    if isinstance(error, UncompletedJobError):  # raised by submitit's signal handler, which says which of the two it is
        cause = "preempted" if "preempted" in message else "timeout"
    elif not isinstance(error, LlemmaError):
        message = f"{type(error).__name__}: {message}"
    failure = RankFailure(rank, time.time(), message, cause, isinstance(error, _REFUSALS))
    write_atomically(_failure_file(folder, index, rank), json.dumps(asdict(failure)))


def _failure_file(folder: Path, index: int, rank: int) -> Path:
    return folder / f"task_{index}_rank_{rank}_failure.json"


def _end_with_controller() -> None:
    """A local rank must not outlive its controller, else a second submission of the job would meet it."""
    # Not the parent that is there now: a controller may have died before this line.
    controller = int(os.environ[CONTROLLER_VARIABLE])

    def watch() -> None:
        while os.getppid() == controller:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, name="controller-watch", daemon=True).start()
