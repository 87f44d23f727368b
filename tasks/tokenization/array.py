"""Parts made by a job array of a scheduler."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neox_core.config import TokenizeJobConfig
from neox_core.data.tokenization.part import find_part, make_part
from neox_core.data.tokenization.part_files import PARTS, PartPaths
from neox_core.data.tokenization.part_settings import PartRecord, PartSettings
from neox_core.data.tokenization.readers import InputFile
from neox_core.errors import DataError, LlemmaError
from tasks.jobs.executor import Resources
from tasks.jobs.launch import Job, JobPlan, attach_or_submit, find_jobs
from tasks.jobs.retry import SchedulerRetry
from tasks.tokenization.pool import MadeParts

_log = logging.getLogger(__name__)

_MAX_TASKS = 1000  # SLURM's default limit of an array is 1,001
_ENDING_SECONDS = 120.0
"""For cancelled tasks: SLURM kills what has not ended half a minute after its signal, by default."""
_POLL_SECONDS = 1.0

Group = tuple[InputFile, ...]
"""One task's files."""


@dataclass(frozen=True)
class Failure:
    """Why a task could not make one of its parts, in our own words."""

    message: str


def made_in_jobs(
    files: Sequence[InputFile], settings: PartSettings, folder: Path, jobs: TokenizeJobConfig
) -> MadeParts:
    """Make the files' parts in a job array; tasks that an earlier call of this stage submitted are kept, unless they
    failed.

    Raises:
        DataError: the first failure that a task reports; finished parts are kept.
        LaunchError: the array cannot be submitted, a task ended without a result, or the scheduler does not answer for
            long.
    """
    largest_first = sorted(files, key=lambda file: -file.size)
    count = min(len(files), _MAX_TASKS)
    groups = [tuple(largest_first[first::count]) for first in range(count)]
    plan = _plan(groups, settings, folder, jobs)
    retry_policy = SchedulerRetry()
    retry_policy.wait_for(lambda: _end_others(plan))
    job = retry_policy.wait_for(lambda: attach_or_submit(plan))
    for index, (records,) in job.as_completed():
        for file, record in zip(groups[index], records, strict=True):
            if isinstance(record, Failure):
                raise DataError(record.message)
            yield file, record


def make_parts(files: Sequence[InputFile], settings: PartSettings, folder: Path) -> list[PartRecord | Failure]:
    """One task's work; a failure is a result, so that its message arrives without a traceback."""
    results: list[PartRecord | Failure] = []
    for file in files:
        try:
            results.append(make_part(file, settings, folder))
        except LlemmaError as error:
            results.append(Failure(str(error)))
    return results


def job_arrays(folder: Path) -> list[Job]:
    """The arrays that may be at work on the parts in this folder.

    Raises:
        NoAnswer: the scheduler does not answer.
    """
    return find_jobs(jobs_folder(folder), "")


def jobs_folder(folder: Path) -> Path:
    """Where the tasks' logs and results lie, and the record of them."""
    return folder.resolve() / PARTS / "jobs"


def _plan(groups: Sequence[Group], settings: PartSettings, folder: Path, jobs: TokenizeJobConfig) -> JobPlan:
    def has_made(index: int, results: list[Any]) -> bool:
        """Whether the task's parts are whole: a disk or a power cut may have damaged them since. A file that could not
        be read may be readable now."""
        (made,) = results
        if any(isinstance(record, Failure) or record.damaged for record in made):
            return False
        paths = [PartPaths.of(file, folder) for file in groups[index]]
        return all(find_part(path, record.made_from) == record for path, record in zip(paths, made, strict=True))

    calls = [(make_parts, (group, settings, folder.resolve())) for group in groups]
    key = _key_of(groups, settings)
    return JobPlan(jobs_folder(folder), "tokenize", key, calls, task_resources(jobs), jobs.executor, has_made)


def task_resources(jobs: TokenizeJobConfig) -> Resources:
    """What each task of the array needs."""
    return Resources(
        memory_gb=jobs.memory_gb,
        time_limit_minutes=jobs.time_limit_minutes,
        partition=jobs.partition,
        account=jobs.account,
        parallelism=jobs.parallelism,
        parameters=jobs.slurm_parameters,
    )


def _key_of(groups: Sequence[Group], settings: PartSettings) -> str:
    """What tasks are given: another run's, or this one's of before a correction, lie in the same folder."""
    files = [[(file.logical_name, file.location, file.size, _version(file)) for file in group] for group in groups]
    content = json.dumps([files, settings.logical(), settings.skip_damaged_files, settings.tokenizer.engine])
    return hashlib.sha256(content.encode()).hexdigest()


def _version(file: InputFile) -> str | int:
    return file.etag if file.location.startswith("s3://") else Path(file.location).stat().st_mtime_ns


def _end_others(plan: JobPlan) -> int:
    """Cancel arrays for other files or settings, and wait until their tasks have ended: one that is still at work
    could put its files into another's place. Returns how many there were.

    Raises:
        NoAnswer: the scheduler does not answer.
    """
    others = [job for job in find_jobs(plan.folder, "") if job.home != plan.home and not job.done()]
    for job in others:
        job.cancel()
    begun = time.monotonic()
    while remaining := [str(job) for job in others if not job.done()]:
        if time.monotonic() - begun > _ENDING_SECONDS:
            _log.warning("cancelled tasks of %s have not ended after %.0f s", ", ".join(remaining), _ENDING_SECONDS)
            break
        time.sleep(_POLL_SECONDS)
    return len(others)
