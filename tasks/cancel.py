"""Cancels the jobs that a run has left."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial

from neox_core.config import RunConfig
from neox_core.errors import LaunchError
from neox_core.storage.claims import try_claim_name
from tasks.evaluation.jobs import evaluation_jobs
from tasks.identity.specs import evaluate_spec
from tasks.identity.stage import try_claim
from tasks.identity.training import find_trainings
from tasks.jobs.job import Job
from tasks.prepare import PARTS_CLAIM
from tasks.tokenization.array import job_arrays
from tasks.train import training_jobs

_Stage = tuple[AbstractContextManager[bool], Callable[[], Sequence[Job]]]


def cancel_jobs(config: RunConfig) -> list[Job]:
    """Cancel the tokenization, training and evaluation jobs of this configuration, on earlier texts and weights too,
    except of a stage that is being run.

    Returns:
        The jobs that were cancelled.

    Raises:
        LaunchError: SLURM does not answer, or a job runs on another host; other stages' jobs are cancelled anyway.
    """
    stages: list[_Stage] = [(try_claim_name(config.workdir, PARTS_CLAIM), lambda: job_arrays(config.workdir))]
    for training in find_trainings(config):  # none if none was ever submitted
        evaluation = evaluate_spec(config, training.fingerprint)
        stages.append((try_claim(training.spec), partial(training_jobs, training)))
        stages.append((try_claim(evaluation), partial(evaluation_jobs, evaluation)))
    cancelled: list[Job] = []
    failures: list[LaunchError] = []
    for claim, find in stages:
        with claim as claimed:
            try:
                for job in find() if claimed else ():
                    if not job.done():
                        job.cancel()
                        cancelled.append(job)
            except LaunchError as error:
                failures.append(error)
    if failures:
        reasons = "; ".join(map(str, failures))
        raise LaunchError(f"not all jobs could be cancelled, only {[str(job) for job in cancelled]}: {reasons}")
    return cancelled
