"""What one rank of a job runs: its environment and the function, whose result or failure is recorded."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import submitit

from neox_core.errors import GO_ON_EXIT_CODE, StoppedError
from neox_core.train.ends.stopping import LOCAL_END_TIME, SIGNALS, end_time
from tasks.jobs.node.controller import Controller
from tasks.jobs.node.plan import CONTROLLER_VARIABLE, NodePlan, Restarts
from tasks.jobs.node.ranks import rank_log
from tasks.jobs.rank_record import forget, write_failure, write_result
from tasks.jobs.slurm.commands import end_of

_PR_SET_PDEATHSIG = 1
"""Of Linux's prctl."""


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
        forget(self.folder, self.index, rank)  # what a time before a requeue has left
        try:
            result = self.function(*self.args)
        except BaseException as error:  # recorded, not handled: KeyboardInterrupt and SystemExit end a rank too
            write_failure(self.folder, self.index, rank, error)
            if isinstance(error, StoppedError):
                sys.exit(GO_ON_EXIT_CODE)
            raise
        write_result(self.folder, self.index, rank, result)


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
