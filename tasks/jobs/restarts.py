"""A job that is submitted again when it ends before its time, for as long as that brings it further."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from tasks.jobs.failure import JobFailed
from tasks.jobs.job import Job

_log = logging.getLogger(__name__)

_PAUSE_SECONDS = 10.0
"""Before a job is submitted again: SLURM may requeue it itself, or whoever ended it may end us too."""
_WAKE_SECONDS = 0.5


def run_to_end(
    submit: Callable[[], Job],
    follow: Callable[[Job], None],
    saved: Callable[[], int],
    max_restarts: int,
    waiting: Callable[[str], None],
) -> list[Any]:
    """Submit a job of one task, or attach to it, and follow it to its end; again, if it ended without success.

    Args:
        submit: yields the job that is at work, submitting one if there is none.
        follow: returns when the job has ended.
        saved: how far the work is that will not be lost; asked after each end.
        max_restarts: how often in a row the job is submitted again although `saved` has not grown.
        waiting: told again and again, before the next submission, why there will be one.

    Returns:
        What the job's ranks returned.

    Raises:
        JobFailed: it was cancelled or refuses to go on, or there were too many ends; with all reasons since it last
            got further.
        LaunchError: the job cannot be submitted, or the scheduler does not answer for long.
    """
    reasons: list[str] = []
    last = saved()
    while True:
        job = submit()
        try:
            follow(job)
            return job.results()
        except JobFailed as error:
            if error.final:
                raise
            if (now := saved()) > last:
                reasons, last = [], now
            reasons.append(str(error))
            if len(reasons) > max_restarts:
                raise _given_up(reasons, error) from error
            restart = f"{error}; submitting it again ({len(reasons)} of {max_restarts} times without a new checkpoint)"
            _log.warning("%s", restart)
            _pause(restart, waiting)


def _given_up(reasons: list[str], error: JobFailed) -> JobFailed:
    if len(reasons) == 1:
        return error
    earlier = " ".join(f"({number}) {reason}" for number, reason in enumerate(reasons[:-1], start=1))
    return JobFailed(
        f"{reasons[-1]}; it ended {len(reasons)} times without a new checkpoint, which is more than "
        f"launch.max_restarts {len(reasons) - 1} allows; mend the cause and run again. Earlier: {earlier}",
        final=True,
    )


def _pause(why: str, waiting: Callable[[str], None]) -> None:
    deadline = time.monotonic() + _PAUSE_SECONDS
    while time.monotonic() < deadline:
        waiting(why)
        time.sleep(_WAKE_SECONDS)
