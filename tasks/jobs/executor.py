"""What a scheduler has to do for us: submit, find, say in which state a task is and why, cancel.

A scheduler is one file with an `Executor` and its name in tasks/jobs/registry.py; `launch.executor` chooses it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from tasks.jobs.node.plan import Restarts
from tasks.jobs.rank import RankTask
from tasks.jobs.status import Status


@dataclass(frozen=True)
class Resources:
    """What each task of a submission needs."""

    nodes: int = 1
    ranks_per_node: int = 1
    cpus_per_rank: int = 1
    gpus: Literal["auto", "cuda", "cpu"] = "cpu"
    """One GPU per rank, or none."""
    time_limit_minutes: float = 60
    memory_gb: int | None = None
    partition: str | None = None
    account: str | None = None
    parallelism: int | None = None
    """Tasks of the submission that run at the same time."""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    """Further options, as the scheduler names them."""
    restarts: Restarts | None = None
    """How ranks that die are started again within the job; None: it ends with the first."""

    @property
    def ranks(self) -> int:
        """Ranks of each task."""
        return self.nodes * self.ranks_per_node


@dataclass(frozen=True)
class Submission:
    """Tasks that are submitted at once, as a job array if there are several."""

    name: str
    """No other submission has it."""
    folder: Path
    """On a disk that all nodes share, for this submission alone."""
    tasks: Sequence[RankTask]
    """Each is to be called in every rank that `resources` ask for, with torchrun's variables in the environment."""
    resources: Resources


@dataclass(frozen=True)
class Handle:
    """A task that was submitted."""

    id: str
    """The scheduler's."""
    folder: Path
    """The submission's."""
    index: int
    """Among the submission's tasks."""


class Executor(Protocol):
    """A scheduler. Every method may raise `tasks.jobs.retry.NoAnswer` if the scheduler does not answer."""

    poll_seconds: float
    """How long its answer about a task is good for, so that it is not asked more often."""

    def check(self, resources: Resources) -> None:
        """Find out whether such tasks can be submitted from here, without submitting one.

        Raises:
            LaunchError: they cannot; says why.
        """

    def submit(self, submission: Submission) -> list[str]:
        """Submit the tasks; each one's id, in their order. They outlive this process.

        Raises:
            LaunchError: the scheduler refuses.
            NoAnswer: it may have taken the submission all the same, which `find` tells later.
        """

    def find(self, name: str, folder: Path, count: int) -> list[str | None]:
        """What became of a submission whose submitter did not come to note the tasks' ids; None for tasks that do not
        run and never will."""

    def states(self, handles: Collection[Handle]) -> dict[Handle, Status]:
        """Each task's state, asked in as few questions as possible.

        Raises:
            LaunchError: a task cannot be watched from this host.
        """

    def cancel(self, handles: Collection[Handle]) -> None:
        """End the tasks; those that have ended already are passed over.

        Raises:
            LaunchError: the scheduler refuses.
        """

    def log_path(self, handle: Handle, rank: int) -> Path:
        """A rank's log; it appears when the rank starts."""

    def killed_ranks(self, handle: Handle) -> dict[int, str]:
        """How ranks ended that could not say so themselves, in the order in which they did, as far as it is known."""
