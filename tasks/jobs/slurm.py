"""What SLURM says about a job, and retry_policy with its silence.

squeue knows pending and running jobs at once, sacct those that have ended.
"""

from __future__ import annotations

import logging
import subprocess
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import submitit

from neox_core.errors import LaunchError

logger = logging.getLogger(__name__)

SlurmState = Literal["pending", "running", "completed", "failed", "cancelled", "unknown"]

_UNANSWERED = 60
"""Questions in a row that SLURM may leave unanswered: an hour, in which a cluster's controller can be upgraded."""
_SILENCE_SECONDS = 60.0
"""How long after an unanswered question the next one is put."""
_MEANWHILE_SECONDS = 0.5

_SILENT = ("unable to contact", "timed out", "zero bytes were transmitted", "standby mode", "connection refused")
"""In what sbatch and scancel write when they were not refused but have heard nothing."""

AT_WORK: tuple[SlurmState, ...] = ("pending", "running")
_PENDING = {"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "RESV_DEL_HOLD", "SPECIAL_EXIT"}
_RUNNING = {"RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING"}


_Answer = TypeVar("_Answer")


class NoAnswer(LaunchError):
    """SLURM does not answer, so that nothing can be concluded."""


class RetryPolicy:
    """Asks SLURM, and bears it if some questions in a row are not answered: its jobs go on without it."""

    def __init__(self) -> None:
        self._unanswered = 0
        self._asked = float("-inf")

    def ask(self, question: Callable[[], _Answer]) -> _Answer | None:
        """The answer, which must not be None itself; None if there is none for now.

        May be called often: in a silence, the question is put again after a while only.

        Raises:
            LaunchError: there was none too often.
        """
        if self._unanswered and time.monotonic() - self._asked < _SILENCE_SECONDS:
            return None
        try:
            answer = question()
        except NoAnswer as error:
            self._unanswered += 1
            self._asked = time.monotonic()
            if self._unanswered >= _UNANSWERED:
                raise LaunchError(
                    f"{error} (asked {_UNANSWERED} times; what runs in SLURM goes on, and a later run follows it)"
                ) from None
            logger.warning("%s (%d of %d times)", error, self._unanswered, _UNANSWERED)
            return None
        self._unanswered = 0
        return answer

    def wait_for(self, question: Callable[[], _Answer], meanwhile: Callable[[], None] = lambda: None) -> _Answer:
        """The answer, when it comes.

        Args:
            meanwhile: called again and again until then.

        Raises:
            LaunchError: it did not come too often.
        """
        while (answer := self.ask(question)) is None:
            meanwhile()
            time.sleep(_MEANWHILE_SECONDS)
        return answer


@dataclass(frozen=True)
class JobArray:
    """A job array of which some tasks are of interest."""

    name: str
    job_id: str
    tasks: tuple[str, ...]

    def done(self) -> bool:
        """Whether all those tasks have ended, well or not.

        Raises:
            NoAnswer: SLURM does not answer.
        """
        return not any_at_work(self.tasks)

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
        NoAnswer: SLURM does not answer.
    """
    answer = _run(["squeue", "--noheader", "--states=all", f"--jobs={job_id}", "--format=%T"])
    words = answer.stdout.split()
    if answer.returncode == 0 and words:
        return _meaning(words[0])
    if answer.returncode and "invalid job id" not in answer.stderr.lower():
        raise NoAnswer(f"squeue does not answer about job {job_id}: {_one_line(answer.stderr)}: try again")
    return _past_states([job_id])[job_id]


def task_states(tasks: Collection[str]) -> dict[str, SlurmState]:
    """The states of jobs and of arrays' tasks (<array>_<index>): one question to squeue about all of them, and one to
    sacct about those that squeue no longer knows.

    Raises:
        NoAnswer: SLURM does not answer.
    """
    if not tasks:
        return {}
    jobs = sorted({array_of(task) for task in tasks})
    command = ["squeue", "--noheader", "--array", "--states=all", f"--jobs={','.join(jobs)}", "--format=%i %T"]
    answer = _run(command)
    if answer.returncode and "invalid job id" not in answer.stderr.lower():
        raise NoAnswer(f"squeue does not answer about jobs {', '.join(jobs)}: {_one_line(answer.stderr)}: try again")
    rows = [line.split() for line in answer.stdout.splitlines()]
    known = {row[0]: _meaning(row[1]) for row in rows if len(row) == 2}
    past = [task for task in tasks if task not in known]
    return {task: known[task] for task in tasks if task in known} | (_past_states(past) if past else {})


def any_at_work(tasks: Collection[str]) -> bool:
    """Whether any of these tasks has not ended.

    Raises:
        NoAnswer: SLURM does not answer.
    """
    return not set(AT_WORK).isdisjoint(task_states(tasks).values())


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
        raise NoAnswer(f"squeue does not answer about jobs named {name}: {_one_line(answer.stderr)}: try again")
    return next(iter(answer.stdout.split()), None)


def cancel(*jobs: str) -> None:
    """Cancel jobs, arrays or tasks of arrays.

    Raises:
        LaunchError: scancel refuses.
        NoAnswer: SLURM does not answer.
    """
    answer = _run(["scancel", *jobs])
    if answer.returncode:
        raise failure(f"job {', '.join(jobs)} cannot be cancelled", answer.stderr)


def failure(what: str, reason: str) -> LaunchError:
    """The error of sbatch or scancel: refused, or unanswered, in which case SLURM may have done it all the same."""
    reason = _one_line(reason)
    if any(words in reason.lower() for words in _SILENT):
        return NoAnswer(f"{what}, SLURM does not answer: {reason}: try again")
    return LaunchError(f"{what}: {reason}")


def _past_states(jobs: Sequence[str]) -> dict[str, SlurmState]:
    """By sacct, which submitit would ask for us, but would pass over a failure; 'unknown' without accounting."""
    asked = ",".join(sorted(set(map(array_of, jobs))))
    command = ["sacct", "--format=JobID,State", "--parsable2", f"--jobs={asked}"]
    answer = _run(command)
    if answer.returncode and "accounting storage is disabled" not in answer.stderr.lower():
        raise NoAnswer(f"sacct does not answer about jobs {asked}: {_one_line(answer.stderr)}: try again")
    known = submitit.SlurmJob.watcher.read_info(answer.stdout)
    return {job: _meaning((known.get(job, {}).get("State") or "UNKNOWN").split()[0]) for job in jobs}


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
        raise NoAnswer(f"{command[0]} does not answer: {error}: try again") from None


def _one_line(text: str) -> str:
    return " ".join(text.split()) or "no reason given"
