"""Where the things of a run lie: its report, checkpoints, runs of W&B, jobs and their logs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, urlencode

from neox_core.storage.object_store import ObjectStore
from tasks.evaluation.jobs import evaluation_jobs
from tasks.identity.specs import EVALUATE, TRAIN, evaluate_spec
from tasks.identity.training import Training
from tasks.jobs.job import Job
from tasks.report.wandb_runs import wandb_links
from tasks.train import training_jobs

REPORT_FILE = "report.html"
"""In the workdir, and next to the checkpoints."""


@dataclass(frozen=True)
class Place:
    """Something that people look for."""

    what: str
    where: str
    """A path, an address or an object's full name."""
    address: str | None = None
    """For a browser; None: it has none."""


def report_key(training: Training) -> str:
    """The report's in the store."""
    return f"{training.prefix}/{REPORT_FILE}"


def places(training: Training) -> Iterator[Place]:
    """Of a training: its report, checkpoints, and runs of W&B. Asks nobody."""
    store, prefix, key = training.store, training.prefix, report_key(training)
    yield Place("report", str(training.config.workdir / REPORT_FILE))
    yield Place("report in the store", store.url(key), web_address(store, key))
    yield Place("checkpoints", store.url(prefix), web_address(store, prefix))
    for what, where in wandb_links(training).items():
        yield Place(what, where, where if where.startswith(("https://", "http://")) else None)


def web_address(store: ObjectStore, key: str) -> str:
    """Where a browser finds what lies below a key, or an object, with the rights of whoever looks."""
    if store.config.endpoint_url is None:
        where = urlencode({"region": store.config.region, "prefix": store.full_key(key)})
        return f"https://console.aws.amazon.com/s3/buckets/{store.bucket}?{where}"
    return f"{store.endpoint}/{store.bucket}/{quote(store.full_key(key))}"


def job_place(training: Training, stage: str) -> Place | None:
    """The stage's newest job and the folder of its logs; None before there is one.

    Raises:
        NoAnswer: a job was being submitted when its submitter died, and the scheduler does not answer.
    """
    if stage == TRAIN:
        jobs = training_jobs(training)
    elif stage == EVALUATE:
        jobs = evaluation_jobs(evaluate_spec(training.config, training.fingerprint))
    else:
        jobs = []
    if not jobs:
        return None
    newest = max(jobs, key=lambda job: _age(_logs(job)))
    scheduler = "SLURM job" if newest.record.executor == "slurm" else f"{newest.record.executor} job"
    return Place(f"{scheduler} {newest.job_id}: its logs", str(_logs(newest)))


def _logs(job: Job) -> Path:
    return job.record.tasks[-1].folder


def _age(folder: Path) -> float:
    return folder.stat().st_mtime if folder.exists() else 0.0
