"""What SLURM says about a job. squeue knows pending and running jobs at once, sacct those that have ended."""

from __future__ import annotations

import logging
import subprocess
from collections.abc import Sequence
from typing import Literal

import submitit

from neox_core.errors import LaunchError

logger = logging.getLogger(__name__)

SlurmState = Literal["pending", "running", "completed", "failed", "cancelled", "unknown"]

_PENDING = {"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "RESV_DEL_HOLD", "SPECIAL_EXIT"}
_RUNNING = {"RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING"}


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
    watcher = submitit.SlurmJob.watcher
    watcher.clear()  # it never asks again about a job that it once took for ended, such as a requeued one
    return _meaning(str(watcher.get_state(job_id, mode="force")).split()[0])


def find_by_name(name: str) -> str | None:
    """Id of this user's pending or running job of that name.

    Raises:
        LaunchError: SLURM does not answer.
    """
    answer = _run(["squeue", "--noheader", "--me", f"--name={name}", "--format=%A"])
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
