"""How a training job is, in a line: the job's state and SLURM's reason first, then how far it is."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from neox_core.config import RunConfig, sequences_before
from neox_core.progress import Progress, short_time
from neox_core.train.ends.saving import behind
from neox_core.train.observe.rows import last_row
from tasks.jobs.failure import JobFailed
from tasks.jobs.job import Job
from tasks.jobs.status import Status

_POLL_SECONDS = 1.0
_NO_STEP_SECONDS = 120.0
"""After which it is said that there was no step."""
_HELD = ("requeued in held state", "requeued held", "jobholdmaxrequeue")
"""In SLURM's reasons of a job that it has put back into the queue, and will not start by itself."""


def follow(job: Job, config: RunConfig, metrics: Path, progress: Progress) -> None:
    """Report progress until the job has ended.

    Raises:
        JobFailed: SLURM holds the job after a requeue; it was cancelled, to be submitted again.
        LaunchError: SLURM does not answer for long.
    """
    seen, since = "", time.time()
    for status in job.while_at_work():
        if status and (state := str(status)) != seen:
            seen, since = state, time.time()
        if status and _is_held(status):
            job.cancel()
            raise JobFailed(
                f"{job} was put back into the queue by SLURM, which holds it ({status.reason})", final=False
            )
        text = describe(job.job_id, status, since, last_step(metrics), metrics, config)
        progress(share_done(config, metrics), text)
        time.sleep(_POLL_SECONDS)


def share_done(config: RunConfig, metrics: Path) -> float:
    """How much of the training's steps was done, 0 to 1."""
    row = last_step(metrics)
    return row["step"] / config.train.steps if row else 0.0


def last_step(metrics: Path) -> Mapping[str, Any] | None:
    """The metrics of the training step that was done last, if there was one; a training that goes on from a checkpoint
    does some again."""
    return last_row(metrics, "train/loss")


def describe(
    job_id: str,
    status: Status | None,
    since: float,
    row: Mapping[str, Any] | None,
    metrics: Path,
    config: RunConfig,
) -> str:
    """What to say of a job.

    Args:
        status: the scheduler's answer; None: it does not answer.
        since: unix seconds at which the job was first seen in this state.
        row: metrics of the last step, of whichever attempt.
        metrics: the file that `row` is from, which every step touches.
    """
    if status is None:
        return "; ".join([f"job {job_id} may be at work: SLURM does not answer", *_last(row, config)])
    if status.state == "pending":
        return "; ".join([f"job {job_id} {status}, for {short_time(time.time() - since)}", *_last(row, config)])
    if row is None:
        return f"job {job_id} {status}" + _silence(time.time() - since)
    step_time = metrics.stat().st_mtime
    if step_time < since:  # an earlier attempt's, or this one's while nobody looked
        silence = _silence(time.time() - since)
        return "; ".join([f"job {job_id} {status}{silence}", *_last(row, config)])
    silence = _silence(time.time() - step_time)
    prefix = f"job {job_id} {status}{silence}; " if silence else ""
    late = "".join(f"; {line}" for line in behind(metrics.parent)[:1])
    return f"{prefix}{_step(row, config)}, {row['train/tokens_per_second']:,.0f} tokens/s{_left(row, config)}{late}"


def _is_held(status: Status) -> bool:
    reason = status.reason.lower().replace("_", " ")
    return status.state == "pending" and any(words in reason for words in _HELD)


def _last(row: Mapping[str, Any] | None, config: RunConfig) -> Iterator[str]:
    if row:
        yield f"last: {_step(row, config)}"


def _step(row: Mapping[str, Any], config: RunConfig) -> str:
    return f"step {row['step']} of {config.train.steps}, loss {row['train/loss']:.3f}"


def _left(row: Mapping[str, Any], config: RunConfig) -> str:
    train = config.train
    sequences = sequences_before(train, train.steps + 1) - sequences_before(train, row["step"] + 1)
    tokens = sequences * train.sequence_length
    return f", {short_time(tokens / row['train/tokens_per_second'])} left" if tokens else ""


def _silence(seconds: float) -> str:
    return f", no step for {short_time(seconds)}" if seconds >= _NO_STEP_SECONDS else ""
