"""Jobs of an evaluation, followed to their end."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

from tasks.jobs.launch import Job
from tasks.jobs.restarts import run_to_end
from tasks.jobs.retry import SchedulerRetry


class Report(Protocol):
    """Tells how far the evaluation is, in these words or its own; also the moment at which it hears an interruption."""

    def __call__(self, text: str = "", /) -> None: ...


def follow_to_end(
    submit: Callable[[], Job],
    report: Report,
    max_restarts: int,
    saved: Callable[[], int] = lambda: 0,
    words: Callable[[], str] = lambda: "",
) -> Any:
    """What rank 0 of a job returned; it is submitted again as `run_to_end` does.

    Args:
        saved: how much of its work will not be lost.
        words: how far it is.

    Raises:
        JobFailed, LaunchError: see `run_to_end`.
    """

    def follow(job: Job) -> None:
        for _ in job.while_at_work():
            report(words())
            time.sleep(0.2)

    return run_to_end(lambda: SchedulerRetry().wait_for(submit, meanwhile=report), follow, saved, max_restarts, report)[
        0
    ]
