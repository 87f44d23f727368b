"""The local executor: jobs of one task in processes of this machine, by submitit with our controller of a node."""

from __future__ import annotations

import fcntl
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import JobPaths

from infra.processes import ProcessRecord, end_processes, wait_for_end
from neox_core.errors import LaunchError
from neox_core.train.ends.stopping import LOCAL_END_TIME
from tasks.jobs.executor import Handle, Resources, Submission
from tasks.jobs.node.plan import NodePlan
from tasks.jobs.node.report import ControllerReport, exits_of
from tasks.jobs.status import Cause, Status

_log = logging.getLogger(__name__)

_CANCEL_SECONDS = 10.0
_START_SECONDS = 300.0
"""For a controller to report itself, on a busy machine; one that has ended is not waited for."""

CPU_ONLY = {"DS_ACCELERATOR": "cpu"}
"""Variables that keep DeepSpeed off the GPUs of a machine."""


class LocalExecutor:
    """Runs jobs here; see `tasks.jobs.executor.Executor`. They outlive the submitter, and one failed rank ends all."""

    poll_seconds = 0.0

    def check(self, resources: Resources) -> None:
        """Raise a LaunchError if there is more than one node, or too few GPUs."""
        if resources.nodes > 1:
            raise LaunchError(
                f"launch.nodes is {resources.nodes}, but without SLURM there is one: set it to 1, or run where sbatch "
                "is and SLURM answers"
            )
        _gpus(resources)

    def submit(self, submission: Submission) -> list[str]:
        """Start the task's controller; the id is its pid."""
        self.check(submission.resources)
        if len(submission.tasks) != 1:
            raise LaunchError(
                f"{submission.name} has {len(submission.tasks)} tasks, but the local executor takes one: use slurm, or "
                "set data.slurm to null to tokenize in processes here"
            )
        (submission.folder / "host").write_text(socket.gethostname())
        executor = _SubmititExecutor(submission)
        executor.update_parameters(
            tasks_per_node=submission.resources.ranks_per_node,
            timeout_min=submission.resources.time_limit_minutes,
            stderr_to_stdout=True,
        )
        try:
            return [str(executor.submit(submission.tasks[0]).job_id)]
        except OSError as error:
            raise LaunchError(f"{submission.name} cannot be started: {' '.join(str(error).split())}") from error

    def find(self, name: str, folder: Path, count: int) -> list[str | None]:
        """By the report of the controller, which is waited for if it is starting."""
        report = _report(folder)
        return [str(report.controller.pid) if report else None] * count

    def states(self, handles: Collection[Handle]) -> dict[Handle, Status]:
        """Look at the processes."""
        return {handle: self._status(handle.folder) for handle in handles}

    def cancel(self, handles: Collection[Handle]) -> None:
        """End the processes; returns when they have ended."""
        for handle in handles:
            _check_host(handle.folder)
            if (report := _report(handle.folder)) and is_running(handle.folder):
                (handle.folder / "cancelled").touch()
                report.controller.send(signal.SIGTERM)
                wait_for_end(_processes(handle.folder), _CANCEL_SECONDS)
                end_processes(_processes(handle.folder), _CANCEL_SECONDS)

    def log_path(self, handle: Handle, rank: int) -> Path:
        """As submitit names it."""
        return Path(JobPaths(handle.folder, job_id=handle.id, task_id=rank).stdout)

    def killed_ranks(self, handle: Handle) -> dict[int, str]:
        """By the exit codes that the controller saw."""
        return exits_of(handle.folder)

    def _status(self, folder: Path) -> Status:
        _check_host(folder)
        if is_running(folder):
            return Status("running")
        if (folder / "cancelled").exists():
            return Status("cancelled", Cause.CANCELLED)
        report = ControllerReport.read(folder)
        return Status("failed", Cause.TIMEOUT if report and report.timed_out else None)


class _SubmititExecutor(submitit.LocalExecutor):  # type: ignore[misc]
    """submitit's local executor with our controller."""

    def __init__(self, submission: Submission) -> None:
        super().__init__(submission.folder)
        self._resources = submission.resources

    def _submit_command(self, command: str) -> Any:
        wanted, gpus = self._resources, _gpus(self._resources)
        seconds = 60 * wanted.time_limit_minutes
        plan = NodePlan(Path(self.folder), "", wanted.ranks_per_node, restarts=wanted.restarts, seconds=seconds)
        environment = os.environ | {
            LOCAL_END_TIME: str(time.time() + seconds),
            "CUDA_VISIBLE_DEVICES": ",".join(str(gpu) for gpu in range(gpus)),
            **({} if gpus else CPU_ONLY),
        }
        # Its own files, not the submitter's: a pipe that the job holds open would keep the reader waiting. Its
        # session is the submitter's, so that Ctrl-C in the terminal ends the job as well.
        folder = Path(self.folder)
        with (folder / "controller.log").open("ab") as log, (folder / "running").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # the controller has it from its first moment to its last
            process = subprocess.Popen(
                [sys.executable, "-m", "tasks.jobs.node.controller", plan.to_json()],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[lock.fileno()],
            )
        return submitit.LocalJob(self.folder, str(process.pid), tasks=list(range(wanted.ranks)), process=process)


def is_running(folder: Path) -> bool:
    """Whether the controller of the job in this folder, or a rank that has lost it, still runs."""
    return _has_controller(folder) or any(process.is_alive() for process in _processes(folder))


def count_gpus() -> int:
    """NVIDIA GPUs of this machine, without loading torch."""
    return len(list(Path("/dev").glob("nvidia[0-9]*")))


def _has_controller(folder: Path) -> bool:
    try:
        with (folder / "running").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def _report(folder: Path) -> ControllerReport | None:
    """The controller's report; None if there is no controller and never was."""
    deadline = time.monotonic() + _START_SECONDS
    while (report := ControllerReport.read(folder)) is None and _has_controller(folder):
        if time.monotonic() > deadline:
            raise LaunchError(f"the job's controller has not reported itself in {folder}: see its controller.log")
        time.sleep(0.05)
    return report or ControllerReport.read(folder)


def _processes(folder: Path) -> tuple[ProcessRecord, ...]:
    report = ControllerReport.read(folder)
    return (report.controller, *report.ranks) if report else ()


def _check_host(folder: Path) -> None:
    host, here = (folder / "host").read_text(), socket.gethostname()
    if host != here:
        raise LaunchError(
            f"the job was started on host {host} and cannot be watched from {here}: go on there, or, if it has ended, "
            f"delete {folder.parent / 'job.json'}"
        )


def _gpus(resources: Resources) -> int:
    """GPUs of the job: one per rank if there are as many."""
    gpus, ranks = count_gpus(), resources.ranks_per_node
    if resources.gpus == "cpu":
        return 0
    if gpus < ranks and resources.gpus == "cuda":
        raise LaunchError(
            f"launch.device is cuda with {ranks} ranks, but this machine has {gpus} GPUs: "
            f"lower launch.ranks_per_node, or set launch.device to cpu"
        )
    if 0 < gpus < ranks:
        _log.warning("%d ranks but %d GPUs: the job runs on CPUs", ranks, gpus)
    return ranks if gpus >= ranks else 0
