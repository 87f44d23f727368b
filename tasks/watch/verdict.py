"""What is to become of a run whose process is gone: the training's own job decides."""

from __future__ import annotations

from dataclasses import dataclass, replace

from neox_core.config import RunConfig
from neox_core.train.observe.metrics import METRICS_FILE
from tasks.follow import last_step
from tasks.identity.stage import find
from tasks.identity.training import Training, find_training
from tasks.jobs.failure import JobFailed
from tasks.jobs.job import Job
from tasks.overview import newest_job, submitted


@dataclass(frozen=True)
class Verdict:
    """Whether a run is to be run again, and why."""

    go_on: bool
    text: str
    """How the training's job is, in words."""


def verdict(config: RunConfig, since: float) -> Verdict:
    """Whether a run of this configuration would go on from where it is: it attaches to a job that is at work, and
    submits one that has ended before its time again. A job that somebody cancelled, or that refuses to go on, stays
    ended until a person runs it again.

    Args:
        since: unix seconds at which the run began. It may well be the one that is to go on after an earlier end.

    Raises:
        NoAnswer: the scheduler does not answer, so that nothing can be said.
        LaunchError: a local job belongs to another host.
    """
    training = find_training(config)
    if training is None:
        return Verdict(True, "no training was begun")
    if find(training.spec.identity):
        return Verdict(True, "the training has finished")
    job = newest_job(training)
    if job is None:
        return Verdict(True, "no job was submitted")
    found = _verdict(job)
    return found if submitted(job) >= since else replace(found, go_on=True)


def saved_step(training: Training | None) -> int:
    """The last step that a checkpoint was due at, among those that were done; asks no store."""
    row = last_step(training.scratch / METRICS_FILE) if training else None
    interval = training.config.train.checkpoint_interval if training else 1
    return row["step"] // interval * interval if row else 0


def _verdict(job: Job) -> Verdict:
    status = job.status()
    if status.at_work or status.state == "completed":
        return Verdict(True, f"{job} is {status}")
    try:
        job.results()
    except JobFailed as error:
        return Verdict(not error.final, str(error))
    return Verdict(True, f"{job} has completed")
