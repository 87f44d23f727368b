"""A submitted job: what state it is in and why, what its ranks returned, or which of them failed first and how."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from tasks.jobs.executor import Handle
from tasks.jobs.failure import JobFailed, explain, is_final
from tasks.jobs.rank_record import read_result, result_file
from tasks.jobs.record import LOST, JobRecord
from tasks.jobs.registry import executor_named
from tasks.jobs.retry import SchedulerRetry
from tasks.jobs.status import AT_WORK, Cause, State, Status

_POLL_SECONDS = 0.5
"""How often it is looked whether there are results."""
_SHARED_DISK_SECONDS = 15.0
"""Time until a file written on another node is seen here."""


class Job:
    """A job that was submitted by this process or another one, dead or alive: one task, or an array of them."""

    def __init__(self, record: JobRecord) -> None:
        self.record = record
        self._executor = executor_named(record.executor)
        self._asked = float("-inf")
        self._answer: dict[Handle, Status] = {}

    @property
    def job_id(self) -> str:
        """The scheduler's id of the job or array; of a local job the pid of its controller."""
        return self.record.tasks[-1].id.partition("_")[0]

    @property
    def home(self) -> Path:
        """The job's own folder, with its record and a folder per submission."""
        return self.record.tasks[-1].folder.parent

    def statuses(self) -> list[Status]:
        """Each task's. A task whose ranks have all returned has completed, whatever the scheduler says of it.

        Raises:
            NoAnswer: the scheduler does not answer.
            LaunchError: a local job belongs to another host.
        """
        known = [self._known(task) for task in self.record.tasks]
        missing = [task for task, status in zip(self.record.tasks, known, strict=True) if status is None]
        answer = self._ask(missing) if missing else {}
        return [status or answer[task] for task, status in zip(self.record.tasks, known, strict=True)]

    def status(self) -> Status:
        """The job's: that of a task that runs, else of one that waits, has failed, was cancelled, or has completed.

        Raises:
            NoAnswer, LaunchError: as `statuses`.
        """
        order: tuple[State, ...] = ("running", "pending", "failed", "unknown", "cancelled", "completed")
        return min(self.statuses(), key=lambda status: order.index(status.state))

    def state(self) -> State:
        """The job's state alone; unknown to the scheduler and without results is failed."""
        state = self.status().state
        return "failed" if state == "unknown" else state

    def done(self) -> bool:
        """Whether the job has ended, well or not."""
        return self.state() not in AT_WORK

    def while_at_work(self) -> Iterator[Status | None]:
        """The job's state and the scheduler's reason, asked anew each time, until it has ended; None while the
        scheduler does not answer.

        Raises:
            LaunchError: it does not answer for long, or a local job belongs to another host.
        """
        retry_policy = SchedulerRetry()
        while (status := retry_policy.ask(self.status)) is None or status.at_work:
            yield status

    def as_completed(self) -> Iterator[tuple[int, list[Any]]]:
        """Wait for the tasks; each one's place and what the function returned in its ranks, as they end.

        Raises:
            JobFailed: a task was cancelled or failed; says which rank failed first, how, and where its log is.
            LaunchError: the scheduler does not answer for long.
        """
        retry_policy, waiting = SchedulerRetry(), set(range(len(self.record.tasks)))
        while waiting:
            absent = [task for index in sorted(waiting) if not self._has_returned(task := self.record.tasks[index])]
            # Asked before results are looked for again: a task that has ended by now, and has left none, will not.
            statuses = (retry_policy.ask(partial(self._ask, absent)) if absent else None) or {}
            for index in sorted(waiting):
                task = self.record.tasks[index]
                if not self._has_returned(task) and (status := statuses.get(task)) and not status.at_work:
                    self._await_results(task, status)
                if self._has_returned(task):
                    waiting.discard(index)
                    yield index, [read_result(task.folder, task.index, rank) for rank in range(self.record.ranks)]
            if waiting:
                time.sleep(_POLL_SECONDS)

    def results(self) -> list[Any]:
        """Wait for a job of one task to end; what the function returned in each rank, by rank.

        Raises:
            LaunchError: as `as_completed`.
        """
        ((_, results),) = self.as_completed()
        return results

    def cancel(self) -> None:
        """End the job; returns at once on SLURM, and when all processes have ended otherwise."""
        statuses = zip(self.record.tasks, self.statuses(), strict=True)
        self._executor.cancel([task for task, status in statuses if status.at_work])
        self._asked = float("-inf")

    def log_paths(self, index: int = 0) -> list[Path]:
        """The logs of a task's ranks, by rank; a file appears when its rank starts."""
        return [self._executor.log_path(self.record.tasks[index], rank) for rank in range(self.record.ranks)]

    def __str__(self) -> str:
        kind = "job" if len(self.record.tasks) == 1 else "job array"
        return f"{kind} {self.job_id} ({self.record.name})"

    def _has_returned(self, task: Handle) -> bool:
        return all(result_file(task.folder, task.index, rank).exists() for rank in range(self.record.ranks))

    def _known(self, task: Handle) -> Status | None:
        if self._has_returned(task):
            return Status("completed")
        return Status("failed", Cause.ERROR, "it was not submitted") if task.id == LOST else None

    def _ask(self, tasks: Collection[Handle]) -> dict[Handle, Status]:
        """What the scheduler says of tasks. That is good for a while, for longer if it is about many tasks, so that a
        caller may ask often."""
        good_seconds = self._executor.poll_seconds * (1 + len(tasks) / 100)
        if time.monotonic() - self._asked > good_seconds or not self._answer.keys() >= set(tasks):
            self._answer = self._executor.states([task for task in tasks if task.id != LOST])
            self._answer |= {task: Status("failed", Cause.ERROR) for task in tasks if task.id == LOST}
            self._asked = time.monotonic()
        return self._answer

    def _await_results(self, task: Handle, status: Status) -> None:
        """Wait for the results of a task that has ended.

        Raises:
            JobFailed: they do not appear, or it failed.
        """
        deadline = time.monotonic() + _SHARED_DISK_SECONDS
        while status.state in ("completed", "unknown") and not self._has_returned(task):
            if time.monotonic() > deadline:
                break
            time.sleep(_POLL_SECONDS)
        if not self._has_returned(task):
            label = str(self) if len(self.record.tasks) == 1 else f"task {task.id} of {self}"
            why = explain(self._executor, task, self.record.ranks, status)
            raise JobFailed(f"{label} {why}", final=is_final(task, self.record.ranks, status))
