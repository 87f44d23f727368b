"""SLURM's commands: squeue knows pending and running jobs at once, sacct those that have ended."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime

from neox_core.errors import LaunchError
from tasks.jobs.retry import NoAnswer
from tasks.jobs.slurm.states import status_of
from tasks.jobs.status import Status

_SILENT = ("unable to contact", "timed out", "zero bytes were transmitted", "standby mode", "connection refused")
"""In what sbatch and scancel write when they were not refused but have heard nothing."""
_UNKNOWN_NAMES = ("invalid account", "invalid partition", "invalid qos", "reservation is invalid", "not permitted")
"""In what sbatch writes of a name that the cluster lacks, or that this user may not use."""
_PING_SECONDS = 60.0
"""On a busy login node; without an answer, jobs would run there."""


def answers() -> bool:
    """Whether a SLURM controller answers here, primary or backup."""
    try:
        answer = _run(["scontrol", "ping"], _PING_SECONDS)
    except NoAnswer:
        return False
    return re.search(r"\bUP\b", answer.stdout) is not None


def has_accounting() -> bool:
    """Whether SLURM keeps a record of ended jobs.

    Raises:
        NoAnswer: it does not answer.
    """
    return _run(["sacct", "--allocations", "--noheader", "--starttime=now"]).returncode == 0


def task_states(tasks: Collection[str]) -> dict[str, Status]:
    """The states of jobs and of arrays' tasks (<array>_<index>): one question to squeue about all of them, and one to
    sacct about those that squeue no longer knows, or knows to have ended.

    Raises:
        NoAnswer: SLURM does not answer.
    """
    if not tasks:
        return {}
    jobs = ",".join(sorted({array_of(task) for task in tasks}))
    answer = _run(["squeue", "--noheader", "--array", "--states=all", f"--jobs={jobs}", "--format=%i|%T|%r"])
    if answer.returncode and "invalid job id" not in answer.stderr.lower():
        raise NoAnswer(f"squeue does not answer about jobs {jobs}: {one_line(answer.stderr)}: try again")
    rows = [line.strip().split("|") for line in answer.stdout.splitlines()]
    known = {row[0]: status_of(row[1], reason=row[2]) for row in rows if len(row) == 3}
    past = [task for task in tasks if task not in known or not known[task].at_work]
    found = _past_states(past) if past else {}
    # What accounting has not come to know yet, or does not keep, is as squeue says.
    return {task: found.get(task) or known.get(task) or Status("unknown") for task in tasks}


def array_of(task: str) -> str:
    """The id of a task's array; of a job that is no array's, its own."""
    return task.partition("_")[0]


def find_by_name(name: str) -> str | None:
    """Id of this user's pending or running job, or job array, of that name.

    Raises:
        NoAnswer: SLURM does not answer.
    """
    answer = _run(["squeue", "--noheader", "--me", f"--name={name}", "--format=%F"])
    if answer.returncode:
        raise NoAnswer(f"squeue does not answer about jobs named {name}: {one_line(answer.stderr)}: try again")
    return next(iter(answer.stdout.split()), None)


def cancel(jobs: Collection[str]) -> None:
    """Cancel jobs, arrays or tasks of arrays.

    Raises:
        LaunchError: scancel refuses.
        NoAnswer: SLURM does not answer.
    """
    if not jobs:
        return
    answer = _run(["scancel", *jobs])
    if answer.returncode:
        raise failure(f"job {', '.join(jobs)} cannot be cancelled", answer.stderr)


def end_of(job: str) -> float | None:
    """Unix time at which the time of a running job is over; None: squeue does not say, or there is no limit."""
    try:
        answer = _run(["squeue", "--noheader", "--jobs", job, "--format=%e"]).stdout.strip()
        return datetime.fromisoformat(answer).timestamp()  # SLURM's clock is local
    except (NoAnswer, ValueError):
        return None


def check_names(names: Mapping[str, str | None], minutes: float) -> None:
    """Ask SLURM, without submitting, whether it takes jobs of such a length with these options, such as a partition.

    Another answer, such as that no node is free or none is large enough now, is left to the submission.

    Raises:
        LaunchError: it knows one of them not, or this user may not use it.
    """
    options = [f"--{name}={value}" for name, value in names.items() if value]
    if not options:
        return
    answer = _run(["sbatch", "--test-only", *options, f"--time={int(minutes)}", "--wrap=true"])
    reason = one_line(answer.stderr)
    if answer.returncode and any(words in reason.lower() for words in _UNKNOWN_NAMES):
        raise LaunchError(
            f"SLURM takes no job with {' '.join(options)}: {reason}: correct partition, account or slurm_parameters in "
            "launch or data.slurm"
        )


def failure(what: str, reason: str) -> LaunchError:
    """The error of sbatch or scancel: refused, or unanswered, in which case SLURM may have done it all the same."""
    reason = one_line(reason)
    if any(words in reason.lower() for words in _SILENT):
        return NoAnswer(f"{what}, SLURM does not answer: {reason}: try again")
    return LaunchError(f"{what}: {reason}")


def one_line(text: str) -> str:
    """What a command wrote, for a message."""
    return " ".join(text.split()) or "no reason given"


def _past_states(jobs: Sequence[str]) -> dict[str, Status]:
    """What accounting knows; without accounting, nothing."""
    asked = ",".join(sorted(set(map(array_of, jobs))))
    columns = "JobID,State,ExitCode,DerivedExitCode,Reason"
    answer = _run(["sacct", "--allocations", "--noheader", "--parsable2", f"--format={columns}", f"--jobs={asked}"])
    if answer.returncode and "accounting storage is disabled" not in answer.stderr.lower():
        raise NoAnswer(f"sacct does not answer about jobs {asked}: {one_line(answer.stderr)}: try again")
    known: dict[str, Status] = {}
    for line in answer.stdout.splitlines():
        job, state, exit_code, derived, reason = (line.split("|", 4) + [""] * 5)[:5]
        known |= dict.fromkeys(_tasks_of(job), status_of(state, exit_code, derived, reason))
    return {job: known[job] for job in jobs if job in known}


def _tasks_of(job: str) -> list[str]:
    """The tasks that a line is about: one, or those of an array that ended before they began, as in 12_[0-2,5%4]."""
    array, bracket, ranges = job.partition("_[")
    if not bracket:
        return [job]
    tasks: list[str] = []
    for part in ranges.rstrip("]").partition("%")[0].split(","):
        first, _, last = part.partition("-")
        tasks += [f"{array}_{number}" for number in range(int(first), int(last or first) + 1)]
    return tasks


def _run(command: Sequence[str], timeout: float = 60.0) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NoAnswer(f"{command[0]} does not answer: {error}: try again") from None
