"""What must be remembered of a job to find it again, by whatever process."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

from neox_core.errors import LaunchError
from neox_core.storage.atomic import write_atomically
from tasks.jobs.executor import Executor, Handle

_FILE = "job.json"
LOST = ""
"""The id of a task that was not submitted, or whose submission failed."""


@dataclass(frozen=True)
class JobRecord:
    """A job's tasks, each as it was last submitted."""

    name: str
    """Of the last submission: no other one has it, so that the scheduler can be asked for it."""
    executor: str
    ranks: int
    """Of each task."""
    tasks: tuple[Handle, ...]
    """The id is LOST if it is not known."""
    submitted: bool
    """The last submission's ids are noted down; else its submitter died, or got no answer."""

    @classmethod
    def read(cls, home: Path) -> JobRecord | None:
        """Read a job's record; None if there is none.

        Raises:
            LaunchError: an earlier version of this program wrote it.
        """
        path = home / _FILE
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        if "tasks" not in content:
            raise LaunchError(
                f"{path} was written by an earlier version: wait until job {content.get('job_id')} has ended, or "
                "cancel it, then delete the file"
            )
        tasks = tuple(Handle(task["id"], home / task["folder"], task["index"]) for task in content.pop("tasks"))
        return cls(**content, tasks=tasks)

    def write(self, home: Path) -> None:
        """Write the record; folders are stored relative to it."""
        tasks = [{"id": task.id, "folder": task.folder.name, "index": task.index} for task in self.tasks]
        content = {"name": self.name, "executor": self.executor, "ranks": self.ranks, "submitted": self.submitted}
        write_atomically(home / _FILE, json.dumps(content | {"tasks": tasks}, indent=1))

    def recovered(self, executor: Executor) -> JobRecord:
        """With the ids that its submitter did not come to note down.

        Raises:
            NoAnswer: the scheduler does not answer.
        """
        if self.submitted:
            return self
        missing = [task for task in self.tasks if task.id == LOST]
        found = executor.find(self.name, missing[0].folder, len(missing))
        return self.with_ids([task or LOST for task in found])

    def without(self, tasks: Collection[Handle]) -> JobRecord:
        """With these tasks LOST."""
        return replace(self, tasks=tuple(replace(task, id=LOST) if task in tasks else task for task in self.tasks))

    def with_ids(self, ids: list[str]) -> JobRecord:
        """With the ids of the last submission's tasks, in their order."""
        remaining = iter(ids)
        tasks = [replace(task, id=next(remaining)) if task.id == LOST else task for task in self.tasks]
        return replace(self, tasks=tuple(tasks), submitted=True)
