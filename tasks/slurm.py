"""What SLURM says about a job. squeue knows pending and running jobs at once, sacct those that have ended."""

from __future__ import annotations

import logging
import subprocess
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import submitit

from neox_core.errors import LaunchError

logger = logging.getLogger(__name__)

SlurmState = Literal["pending", "running", "completed", "failed", "cancelled", "unknown"]

_PENDING = {"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "RESV_DEL_HOLD", "SPECIAL_EXIT"}
_RUNNING = {"RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING"}


@dataclass(frozen=True)
class JobArray:
    """A job array of which some tasks are of interest."""

    name: str
    job_id: str
    tasks: tuple[str, ...]

    def done(self) -> bool:
        """Whether all those tasks have ended, well or not.

        Raises:
            LaunchError: SLURM does not answer.
        """
        return not {"pending", "running"} & set(task_states(self.tasks).values())

    def cancel(self) -> None:
        """Cancel the whole array.

        Raises:
            LaunchError: scancel refuses.
        """
        cancel(self.job_id)

    def __str__(self) -> str:
        return f"job array {self.job_id} ({self.name})"


def query_state(job_id: str) -> SlurmState:
    """The job's state; 'unknown' if neither squeue nor sacct knows the job, which therefore does not run.

    Raises:
        LaunchError: SLURM does not answer, so that nothing can be concluded.
    """
    answer = _run(["squeue", "--noheader", "--states=all", f"--jobs={job_id}", "--format=%T"])
    words = answer.stdout.split()
    if answer.returncode == 0 and words:
        return _meaning(words[0])
    if answer.returncode and "invalid job id" not in answer.stderr.lower():
        raise LaunchError(f"squeue does not answer about job {job_id}: {_one_line(answer.stderr)}: try again")
    return _past_states([job_id])[job_id]


def task_states(tasks: Collection[str]) -> dict[str, SlurmState]:
    """The states of jobs and of arrays' tasks (<array>_<index>): one question to squeue about all of them, and one to
    sacct about those that squeue no longer knows.

    Raises:
        LaunchError: SLURM does not answer, so that nothing can be concluded.
    """
    if not tasks:
        return {}
    jobs = sorted({array_of(task) for task in tasks})
    command = ["squeue", "--noheader", "--array", "--states=all", f"--jobs={','.join(jobs)}", "--format=%i %T"]
    answer = _run(command)
    if answer.returncode and "invalid job id" not in answer.stderr.lower():
        raise LaunchError(f"squeue does not answer about jobs {', '.join(jobs)}: {_one_line(answer.stderr)}: try again")
    rows = [line.split() for line in answer.stdout.splitlines()]
    known = {row[0]: _meaning(row[1]) for row in rows if len(row) == 2}
    past = [task for task in tasks if task not in known]
    return {task: known[task] for task in tasks if task in known} | (_past_states(past) if past else {})


def array_of(task: str) -> str:
    """The id of a task's array; of a job that is no array's, its own."""
    return task.partition("_")[0]


def find_by_name(name: str) -> str | None:
    """Id of this user's pending or running job, or job array, of that name.

    Raises:
        LaunchError: SLURM does not answer.
    """
    answer = _run(["squeue", "--noheader", "--me", f"--name={name}", "--format=%F"])
    if answer.returncode:
        raise LaunchError(f"squeue does not answer about jobs named {name}: {_one_line(answer.stderr)}: try again")
    return next(iter(answer.stdout.split()), None)


def cancel(job_id: str) -> None:
    """Cancel the job.

    Raises:
        LaunchError: scancel refuses.
    """
    answer = _run(["scancel", job_id])
    if answer.returncode:
        raise LaunchError(f"job {job_id} cannot be cancelled: {_one_line(answer.stderr)}")


def _past_states(jobs: Sequence[str]) -> dict[str, SlurmState]:
    watcher = submitit.SlurmJob.watcher
    watcher.clear()  # it never asks again about a job that it once took for ended, such as a requeued one
    for job in jobs:
        watcher.register_job(job)
    watcher.update()
    return {job: _meaning(str(watcher.get_state(job, mode="cache")).split()[0]) for job in jobs}


def _meaning(state: str) -> SlurmState:
    state = state.rstrip("+").upper()
    if state in _PENDING:
        return "pending"
    if state in _RUNNING:
        return "running"
    if state == "COMPLETED":
        return "completed"
    if state.startswith("CANCELLED"):
        return "cancelled"
    return "unknown" if state == "UNKNOWN" else "failed"


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise LaunchError(f"{command[0]} cannot be run: {error}") from None


def _one_line(text: str) -> str:
    return " ".join(text.split()) or "no reason given"
