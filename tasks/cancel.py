"""Cancels the jobs that a run has left."""

from __future__ import annotations

from neox_core.config import RunConfig
from tasks.evaluate import evaluation_jobs
from tasks.job import Job
from tasks.specs import evaluate_spec, train_spec
from tasks.stage import try_claim
from tasks.train import training_jobs


def cancel_jobs(config: RunConfig) -> list[Job]:
    """Cancel the training and evaluation jobs of this configuration, except of a stage that is being run.

    Returns:
        The jobs that were cancelled.

    Raises:
        LaunchError: SLURM does not answer, or a job runs on another host.
    """
    cancelled = []
    for spec, find in ((train_spec(config), training_jobs), (evaluate_spec(config), evaluation_jobs)):
        with try_claim(spec) as claimed:
            running = [job for job in find(config) if not job.done()] if claimed else []
            for job in running:
                job.cancel()
            cancelled += running
    return cancelled
