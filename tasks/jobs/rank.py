"""What one rank of a job runs: its environment, the function, and a record of what it returned or how it failed."""

from __future__ import annotations

import ctypes
import json
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

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
from neox_core.train.ends.stopping import LOCAL_END_TIME, SIGNALS, end_time
from tasks.jobs.node.plan import NodePlan, Restarts

_REFUSALS = (ConfigError, DataError, CheckpointError, LaunchError, TrainingError)
"""A store that cannot be reached is no refusal: later it may."""
CONTROLLER_VARIABLE = "LLEMMA_CONTROLLER_PID"
"""Of the controller that started the rank; without one, a rank is a task of SLURM's."""
_PR_SET_PDEATHSIG = 1
"""Of Linux's prctl."""


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


@dataclass(frozen=True)
class RankTask:
    """A function to be called in every rank, with torchrun's variables in the environment (RANK, WORLD_SIZE, ...)."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    folder: Path
    """Of the submission, where results and failures are recorded."""
    index: int = 0
    """Among the submission's tasks."""
    restarts: Restarts | None = None
    """How ranks are started again in the job; on SLURM, by a controller that is the one task of its node."""
    ranks_per_node: int = 1

    def __call__(self) -> None:
        """Run the function in this rank of a submitit job, or all ranks of this node."""
        environment = submitit.helpers.TorchDistributedEnvironment()
        if CONTROLLER_VARIABLE not in os.environ and self.restarts:
            self._control(environment)
            return
        meeting = {name: os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT") if name in os.environ}
        environment.export(set_cuda_visible_devices=False, overwrite=True)
        if CONTROLLER_VARIABLE in os.environ:
            os.environ.update(meeting)
            _end_with_controller()
        if self.restarts:  # the function listens when it can stop; the controller says it again and again
            for number in SIGNALS:
                signal.signal(number, signal.SIG_IGN)
        try:
            self.run(environment.rank)
        except BaseException as error:
            _leave(error)  # a thread that waits for something must not keep this process

    def _control(self, environment: Any) -> None:
        """Run this node's ranks. The log of the first one has what is said of all."""
        from tasks.jobs.node.controller import Controller
        from tasks.jobs.node.ranks import rank_log
        from tasks.jobs.slurm_commands import end_of

        plan = NodePlan(
            folder=self.folder,
            job_id=str(submitit.JobEnvironment().job_id),
            ranks=self.ranks_per_node,
            node=environment.rank,
            nodes=environment.world_size,
            index=self.index,
            restarts=self.restarts,
            address=environment.master_addr,
            port=environment.master_port,
            is_told_to_stop=True,
        )
        with rank_log(plan, plan.first_rank).open("ab") as log:
            os.dup2(log.fileno(), sys.stdout.fileno())
            os.dup2(log.fileno(), sys.stderr.fileno())
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
        if end_time() is None and (ends := end_of(plan.job_id)):  # SLURM 22 does not tell its jobs
            os.environ[LOCAL_END_TIME] = str(ends)
        if code := Controller(plan).run():
            sys.exit(code)

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
    decided = cause is not None or isinstance(error, LlemmaError)
    failure = RankFailure(rank, time.time(), message, cause, isinstance(error, _REFUSALS), decided)
    write_atomically(_failure_file(folder, index, rank), json.dumps(asdict(failure)))


def forget(folder: Path, index: int, rank: int) -> None:
    """Remove what an earlier life of the rank has left."""
    _failure_file(folder, index, rank).unlink(missing_ok=True)
    result_file(folder, index, rank).unlink(missing_ok=True)


def _failure_file(folder: Path, index: int, rank: int) -> Path:
    return folder / f"task_{index}_rank_{rank}_failure.json"


def _end_with_controller() -> None:
    """A rank must not outlive its controller, else a second submission of the job would meet it."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # Not the parent that is there now: a controller may have died before that line.
    if os.getppid() != int(os.environ[CONTROLLER_VARIABLE]):
        os._exit(1)


def _leave(error: BaseException) -> NoReturn:
    """End this process now, with the exit code that the error stands for."""
    code = error.code if isinstance(error, SystemExit) else 1
    if not isinstance(error, SystemExit):
        traceback.print_exception(error)
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1)
