"""What one rank of a job runs: the rank's environment, the function, and a record of how it failed."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import UncompletedJobError

from neox_core.errors import LlemmaError
from neox_core.storage.atomic import write_atomically


@dataclass(frozen=True)
class RankFailure:
    """The exception that ended a rank; `time` in unix seconds."""

    rank: int
    time: float
    message: str


@dataclass(frozen=True)
class RankTask:
    """A function to be called in every rank, with torchrun's variables in the environment (RANK, WORLD_SIZE, ...)."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    folder: Path
    """Where failures are recorded."""
    local_port: int | None
    """Where local ranks meet; None: on SLURM, where it follows from the job's id."""

    def __call__(self) -> Any:
        """Run the function in this rank.

        Raises:
            BaseException: whatever the function raised, after it was recorded.
        """
        environment = submitit.helpers.TorchDistributedEnvironment()
        environment.export(set_cuda_visible_devices=False, overwrite=True)
        if self.local_port is not None:
            # The host's name need not resolve on a laptop, and nobody else is to be reached.
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(self.local_port))
            _end_with_controller()
        try:
            return self.function(*self.args)
        except BaseException as error:  # recorded, not handled: KeyboardInterrupt and SystemExit end a rank too
            write_failure(self.folder, environment.rank, error)
            raise


def write_failure(folder: Path, rank: int, error: BaseException) -> None:
    """Record an exception in one line."""
    message = " ".join(str(error).split())
    if isinstance(error, UncompletedJobError):  # raised by submitit's signal handler
        message = f"its time limit (launch.time_limit_minutes) is over, or it was preempted: {message}"
    elif not isinstance(error, LlemmaError):
        message = f"{type(error).__name__}: {message}"
    write_atomically(_failure_file(folder, rank), json.dumps(asdict(RankFailure(rank, time.time(), message))))


def read_failure(folder: Path, rank: int) -> RankFailure | None:
    """The rank's failure, if it recorded one."""
    try:
        return RankFailure(**json.loads(_failure_file(folder, rank).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None


def _failure_file(folder: Path, rank: int) -> Path:
    return folder / f"rank_{rank}_failure.json"


def _end_with_controller() -> None:
    """A local rank must not outlive its controller, else a second submission of the job would meet it."""
    controller = os.getppid()

    def watch() -> None:
        while os.getppid() == controller:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, name="controller-watch", daemon=True).start()
