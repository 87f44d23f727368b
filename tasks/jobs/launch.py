"""Jobs whose identity is a fingerprint: asking twice for the same job yields the same job, not a second one."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neox_core.config import LaunchConfig
from tasks.jobs.executor import Handle, Resources, Submission
from tasks.jobs.job import Job
from tasks.jobs.node.plan import Restarts
from tasks.jobs.rank import RankTask
from tasks.jobs.rank_record import read_result
from tasks.jobs.record import LOST, JobRecord
from tasks.jobs.registry import choose_executor, executor_named
from tasks.jobs.status import Status

__all__ = [
    "Job",
    "JobPlan",
    "attach_or_submit",
    "check_launch",
    "find_job",
    "find_jobs",
    "resources_of",
    "submit_or_attach",
]

_log = logging.getLogger(__name__)

_ATTEMPT = "attempt-"

Call = tuple[Callable[..., Any], tuple[Any, ...]]
"""A function and its arguments."""


@dataclass(frozen=True)
class JobPlan:
    """A job: one task, or several that are submitted as an array. Each calls its function in all its ranks."""

    folder: Path
    """On a disk that all nodes share; what is known of the job lies in `folder`/<key>."""
    name: str
    """What the job does, such as 'train'; part of its name in SLURM."""
    key: str
    """The fingerprint of the job's work."""
    calls: Sequence[Call]
    """By task."""
    resources: Resources
    executor: str = "auto"
    is_still_good: Callable[[int, list[Any]], bool] = lambda index, results: True
    """Whether what a completed task made elsewhere is still there; given its place and its ranks' results."""

    @property
    def home(self) -> Path:
        """The job's own folder."""
        return self.folder.resolve() / self.key


def attach_or_submit(plan: JobPlan) -> Job:
    """Find the job with this key, or submit it. Tasks that are pending, running or completed are kept, whoever
    submitted them; those that ended without success are submitted again.

    Raises:
        LaunchError: the job cannot be submitted.
        NoAnswer: the scheduler does not answer. If it has the job all the same, the next call finds that.
    """
    plan.home.mkdir(parents=True, exist_ok=True)
    with _lock(plan.home):
        kept = _kept(plan)
        if kept and all(task.id != LOST for task in kept.tasks):
            job = Job(kept)
            _log.info("attached to %s", job)
            return job
        return _submit(plan, kept)


def submit_or_attach(
    launch: LaunchConfig,
    folder: Path,
    name: str,
    key: str,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    nodes: int,
    ranks_per_node: int,
    *,
    accept_completed: bool = True,
    saved: Path | None = None,
) -> Job:
    """`attach_or_submit` a job of one task: `function(*args)` in every rank, with torchrun's variables set.

    Args:
        accept_completed: False if what a completed job left elsewhere is gone, so that it must run again.
        saved: file with a number that grows with each save, if ranks that die are to be started again within the job.

    Raises:
        LaunchError, NoAnswer: as `attach_or_submit`.
    """
    resources = resources_of(launch, nodes, ranks_per_node, saved)
    accept = lambda index, results: accept_completed  # noqa: E731
    return attach_or_submit(JobPlan(folder, name, key, [(function, args)], resources, launch.executor, accept))


def check_launch(launch: LaunchConfig) -> None:
    """Find out whether jobs can be launched here, without launching one.

    Raises:
        LaunchError: SLURM is demanded and absent, or without it there are several nodes or too few GPUs.
    """
    executor = executor_named(choose_executor(launch.executor))
    executor.check(resources_of(launch, launch.nodes, launch.ranks_per_node))


def resources_of(launch: LaunchConfig, nodes: int, ranks_per_node: int, saved: Path | None = None) -> Resources:
    """What a job of so many ranks asks for, by the configuration.

    Args:
        saved: see `submit_or_attach`.
    """
    return Resources(
        nodes=nodes,
        ranks_per_node=ranks_per_node,
        cpus_per_rank=launch.cpus_per_rank,
        gpus=launch.device,
        time_limit_minutes=launch.time_limit_minutes,
        partition=launch.partition,
        account=launch.account,
        parameters=launch.slurm_parameters,
        restarts=Restarts(launch.restarts_in_place, saved) if saved else None,
    )


def find_job(folder: Path, key: str) -> Job | None:
    """The job with this key as it was last submitted; None if it never was."""
    record = JobRecord.read(folder.resolve() / key)
    return Job(record) if record and any(task.id != LOST for task in record.tasks) else None


def find_jobs(folder: Path, key_prefix: str) -> list[Job]:
    """All jobs whose keys begin so, also one whose submitter died before it could note the job down.

    Raises:
        NoAnswer: the scheduler does not answer.
    """
    jobs = []
    for home in sorted(path.parent for path in folder.resolve().glob(f"{key_prefix}*/lock")):
        with _lock(home):
            record = _recovered(home)
        if record and any(task.id != LOST for task in record.tasks):
            jobs.append(Job(record))
    return jobs


@contextlib.contextmanager
def _lock(home: Path) -> Iterator[None]:
    """One submitter at a time; the kernel unlocks when it dies."""
    with (home / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _recovered(home: Path) -> JobRecord | None:
    """What is noted down, with what a submitter that died did not come to note."""
    record = JobRecord.read(home)
    if record and not record.submitted:
        record = record.recovered(executor_named(record.executor))
        record.write(home)
    return record


def _kept(plan: JobPlan) -> JobRecord | None:
    """The job's record, in which the tasks that are to be submitted again are LOST; None without a record."""
    record = _recovered(plan.home)
    if record is None:
        return None
    statuses = Job(record).statuses()

    def is_kept(task: Handle, place: int, status: Status) -> bool:
        if status.state != "completed":
            return status.at_work
        try:
            results = [read_result(task.folder, task.index, rank) for rank in range(record.ranks)]
        except FileNotFoundError:  # as the scheduler says; no result has come
            return False
        return plan.is_still_good(place, results)

    with ThreadPoolExecutor() as pool:
        keep = list(pool.map(is_kept, record.tasks, range(len(statuses)), statuses))
    for task, status, kept in zip(record.tasks, statuses, keep, strict=True):
        if not kept:
            _log.info("task %s of job %s is %s: submitting it again", task.id, record.name, status)
    return record.without([task for task, kept in zip(record.tasks, keep, strict=True) if not kept])


def _planned(plan: JobPlan, kept: JobRecord | None, folder: Path) -> tuple[JobRecord, list[Call]]:
    """The record of a new submission, with the calls of the tasks that are not kept."""
    old = kept.tasks if kept else (Handle(LOST, folder, 0),) * len(plan.calls)
    tasks, calls = list(old), list[Call]()
    for place, task in enumerate(old):
        if task.id == LOST:
            tasks[place] = Handle(LOST, folder, len(calls))
            calls.append(plan.calls[place])
    # Those that are kept are at work elsewhere if the executor is another one by now.
    executor = kept.executor if kept and len(calls) < len(old) else choose_executor(plan.executor)
    name = f"llemma-{plan.name}-{plan.key[:12]}-{uuid.uuid4().hex[:8]}"
    return JobRecord(name, executor, plan.resources.ranks, tuple(tasks), submitted=False), calls


def _submit(plan: JobPlan, kept: JobRecord | None) -> Job:
    folder = plan.home / f"{_ATTEMPT}{len(list(plan.home.glob(f'{_ATTEMPT}[0-9]*'))) + 1:04d}"
    record, calls = _planned(plan, kept, folder)
    executor = executor_named(record.executor)
    executor.check(plan.resources)
    folder.mkdir()
    # Noted down first, so that the submission is found by its name if this process is killed meanwhile.
    record.write(plan.home)
    restarts, ranks = plan.resources.restarts, plan.resources.ranks_per_node
    tasks = [RankTask(*call, folder, index, restarts, ranks) for index, call in enumerate(calls)]
    record = record.with_ids(executor.submit(Submission(record.name, folder, tasks, plan.resources)))
    record.write(plan.home)
    job = Job(record)
    _log.info("submitted %s, %d of %d tasks, logs in %s", job, len(calls), len(record.tasks), folder)
    return job
