"""A scheduler whose tasks wait until a test runs or ends them."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

from tasks.jobs.executor import Handle, Resources, Submission
from tasks.jobs.rank import RankTask
from tasks.jobs.retry import NoAnswer
from tasks.jobs.status import Cause, Status


class ScriptedExecutor:
    """See `tasks.jobs.executor.Executor`. Ids are like SLURM's: 1_0 and 1_1 of an array of two, 2 of a single task."""

    poll_seconds = 0.0

    def __init__(self) -> None:
        self.tasks: dict[str, RankTask] = {}
        self.states_by_id: dict[str, Status] = {}
        self.by_name: dict[str, list[str]] = {}
        self.cancelled: list[str] = []
        self.questions: list[list[str]] = []
        self.silent = 0
        """Questions that are left unanswered."""
        self.ending: dict[str, int] = {}
        """Questions until a cancelled task has ended."""
        self.on_submit: Callable[[list[str]], None] = lambda ids: None
        """What happens to the tasks before `submit` returns."""

    def check(self, resources: Resources) -> None:
        assert resources.nodes == 1

    def submit(self, submission: Submission) -> list[str]:
        number, several = len(self.by_name) + 1, len(submission.tasks) > 1
        ids = [f"{number}_{place}" if several else str(number) for place in range(len(submission.tasks))]
        self.by_name[submission.name] = ids
        self.tasks |= dict(zip(ids, submission.tasks, strict=True))
        self.end("pending", *ids)
        self.on_submit(ids)
        return ids

    def find(self, name: str, folder: Path, count: int) -> list[str | None]:
        return list(self.by_name.get(name, [])) or [None] * count

    def states(self, handles: Collection[Handle]) -> dict[Handle, Status]:
        self.questions.append([handle.id for handle in handles])
        if self.silent:
            self.silent -= 1
            raise NoAnswer("the scheduler does not answer: Socket timed out")
        for task in list(self.ending):
            self.ending[task] -= 1
            if self.ending[task] == 0:
                self.end("cancelled", task)
                del self.ending[task]
        return {handle: self.states_by_id[handle.id] for handle in handles}

    def cancel(self, handles: Collection[Handle]) -> None:
        """Tasks end a while after their cancelling."""
        self.cancelled += [handle.id for handle in handles]
        self.ending |= dict.fromkeys([handle.id for handle in handles], 2)

    def log_path(self, handle: Handle, rank: int) -> Path:
        return handle.folder / f"{handle.id}_{rank}_log.out"

    def killed_ranks(self, handle: Handle) -> dict[int, str]:
        return {}

    def run(self, *ids: str) -> None:
        """Run tasks of one rank in this process."""
        for task in ids:
            self.tasks[task].run(0)
            self.end("completed", task)

    def end(self, state: str, *ids: str) -> None:
        statuses = {
            "pending": Status("pending"),
            "running": Status("running"),
            "completed": Status("completed"),
            "failed": Status("failed", Cause.ERROR),
            "timeout": Status("failed", Cause.TIMEOUT),
            "cancelled": Status("cancelled", Cause.CANCELLED),
        }
        self.states_by_id |= dict.fromkeys(ids, statuses[state])
