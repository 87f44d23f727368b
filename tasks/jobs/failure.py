"""Why a task ended without results, in words; and whether another attempt may do better."""

from __future__ import annotations

from neox_core.errors import LaunchError
from tasks.jobs.executor import Executor, Handle
from tasks.jobs.node.report import ControllerReport
from tasks.jobs.rank_record import RankFailure, last_words, read_failure
from tasks.jobs.status import Cause, Status


class JobFailed(LaunchError):
    """A job that has ended without results."""

    def __init__(self, message: str, *, final: bool) -> None:
        super().__init__(message)
        self.final = final
        """Another attempt would end likewise: it was cancelled, or the program refused to go on."""


def is_final(task: Handle, ranks: int, status: Status) -> bool:
    """Whether somebody cancelled the task, or the first rank that failed said that it must not go on."""
    if status.cause is not None and status.cause is not Cause.ERROR:
        return status.cause is Cause.CANCELLED
    failures = _failures(task, ranks).values()
    return bool(failures) and min(failures, key=lambda failure: failure.time).refused


def explain(executor: Executor, task: Handle, ranks: int, status: Status) -> str:
    """What follows after the job's name: what the scheduler saw, or which rank failed first and how; and the log."""
    logs = f"logs are in {task.folder}"
    own_words = f" ({status.reason})" if status.reason else ""
    if status.cause is Cause.CANCELLED:
        return f"{status.cause.value.removeprefix('it ')}{own_words}; {logs}"
    if status.cause not in (None, Cause.ERROR):
        return f"failed: {status.cause.value}{own_words}; {logs}"
    rank, reason = _first_failure(executor, task, ranks)
    if rank is not None:
        log = executor.log_path(task, rank)
        return f"failed, rank {rank} first: {reason}{own_words} (log: {log}){_restarts(task)}"
    if status.state in ("completed", "unknown"):
        known = "has completed" if status.state == "completed" else "is not known to the scheduler any more"
        said = last_words(executor.log_path(task, 0))
        return f"failed: it {known}, but left no result; last words of rank 0: {said}; {logs}"
    return f"failed: {reason}{own_words}; {logs}"


def _first_failure(executor: Executor, task: Handle, ranks: int) -> tuple[int | None, str]:
    """Rank and reason. A rank that was killed comes before those that noticed it and raised an error."""
    failures = _failures(task, ranks)
    for rank, ending in executor.killed_ranks(task).items():
        if rank not in failures:
            said = last_words(executor.log_path(task, rank))
            return rank, f"{ending} without a Python error; last words: {said}"
    if failures:
        first = min(failures.values(), key=lambda failure: failure.time)
        return first.rank, _words_of(first)
    return None, (
        "it ended without a word from any rank (killed, out of memory, hung, or over its time limit); "
        f"last words of rank 0: {last_words(executor.log_path(task, 0))}"
    )


def _failures(task: Handle, ranks: int) -> dict[int, RankFailure]:
    return {rank: failure for rank in range(ranks) if (failure := read_failure(task.folder, task.index, rank))}


def _words_of(failure: RankFailure) -> str:
    if failure.cause is None:
        return failure.message
    return f"{Cause[failure.cause.upper()].value} ({failure.message.rstrip('.')})"


def _restarts(task: Handle) -> str:
    """Why the job's ranks were started again before this end."""
    report = ControllerReport.read(task.folder)
    earlier = report.restarts[:-1] if report else []
    if not earlier:
        return ""
    listed = " ".join(f"({number}) {reason}" for number, reason in enumerate(earlier, start=1))
    return f"; before, without a new checkpoint, all ranks were started again in the job because of: {listed}"
