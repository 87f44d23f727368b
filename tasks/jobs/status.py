"""What a scheduler says of a task: the state, and why it has ended."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

State = Literal["pending", "running", "completed", "failed", "cancelled", "unknown"]
"""unknown: the scheduler does not know the task, which therefore does not run."""

AT_WORK: tuple[State, ...] = ("pending", "running")


class Cause(StrEnum):
    """Why a task has ended without success; the value says what happened and what to do."""

    ERROR = "it ended with an error: see the log"
    TIMEOUT = "its time limit is over: run again to go on from what is saved, or raise time_limit_minutes"
    NODE_FAIL = (
        "a node failed: run again, the job gets another one; if that node fails again, leave it out "
        "(slurm_parameters: {exclude: NODE})"
    )
    OUT_OF_MEMORY = (
        "it used more main memory than it may: ask for more (slurm_parameters: {mem: 500G}; data.slurm.memory_gb for "
        "tokenization)"
    )
    PREEMPTED = (
        "a job of higher priority took its place: run again to go on from what is saved, or choose a partition "
        "without preemption"
    )
    CANCELLED = "it was cancelled: run again to go on from what is saved"


@dataclass(frozen=True)
class Status:
    """What a scheduler says of a task."""

    state: State
    cause: Cause | None = None
    """Of a task that failed or was cancelled, if it is known."""
    reason: str = ""
    """The scheduler's own words: why the task waits, or how it ended."""

    @property
    def at_work(self) -> bool:
        """Whether the task waits or runs."""
        return self.state in AT_WORK

    def __str__(self) -> str:
        return f"{self.state} ({self.reason})" if self.reason else self.state
