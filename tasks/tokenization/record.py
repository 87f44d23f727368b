"""What is noted down of the job array that makes parts, so that a later call finds it again."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections import defaultdict
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import pickle_load

from neox_core.data.tokenization.part import find_part
from neox_core.data.tokenization.part_files import PARTS, PartPaths
from neox_core.data.tokenization.part_settings import PartSettings
from neox_core.data.tokenization.readers import InputFile
from neox_core.storage.atomic import write_atomically
from tasks.jobs import slurm

_log = logging.getLogger(__name__)

_RECORD = "array.json"
_ENDING_SECONDS = 120.0
"""For cancelled tasks: SLURM kills what has not ended half a minute after its signal, by default."""
_POLL_SECONDS = 1.0

Group = tuple[InputFile, ...]
"""One task's files."""


@dataclass(frozen=True)
class Failure:
    """Why a task could not make one of its parts, in our own words."""

    message: str


def job_arrays(folder: Path) -> list[slurm.JobArray]:
    """The arrays that may be at work on the parts in this folder.

    Raises:
        NoAnswer: SLURM does not answer.
    """
    home, arrays = home_of(folder), defaultdict[str, list[str]](list)
    for task in filter(None, _noted(home)[1]):
        if not Path(submitit.SlurmJob(home, task).paths.result_pickle).exists():
            arrays[slurm.array_of(task)].append(task)
    return [slurm.JobArray("tokenize", array, tuple(tasks)) for array, tasks in arrays.items()]


def home_of(folder: Path) -> Path:
    """Where the tasks' logs and results lie, and the record of them."""
    return folder.resolve() / PARTS / "jobs"


def key_of(groups: Sequence[Group], settings: PartSettings) -> str:
    """What tasks are given: another run's, or this one's of before a correction, lie in the same folder."""
    files = [[(file.logical_name, file.location, file.size, _version(file)) for file in group] for group in groups]
    content = json.dumps([files, settings.logical(), settings.skip_damaged_files, settings.tokenizer.engine])
    return hashlib.sha256(content.encode()).hexdigest()


def note(home: Path, key: str, tasks: Sequence[str | None], name: str) -> None:
    """Write down each group's task; those that have none yet are being submitted as an array of that name."""
    write_atomically(home / _RECORD, json.dumps({"groups": key, "jobs": tasks, "name": name}))


def attach(home: Path, groups: Sequence[Group], key: str, folder: Path) -> dict[Group, Any]:
    """The tasks of an earlier call that are at work or have made their parts. If that was for other files or
    settings, they are cancelled.

    Raises:
        NoAnswer: SLURM does not answer.
    """
    noted_key, tasks = _noted(home)
    jobs = [submitit.SlurmJob(home, task) if task else None for task in tasks]
    unfinished = [job.job_id for job in jobs if job and not Path(job.paths.result_pickle).exists()]
    states = slurm.task_states(unfinished)
    at_work = {task for task, state in states.items() if state in slurm.AT_WORK}
    if noted_key != key:
        _cancel({slurm.array_of(task) for task in at_work}, at_work)
        return {}
    # Of a call that was killed between sbatch and submitit's laying down the task's pickle, or that sbatch gave no
    # answer: such a task would look for it for a minute, in another's place, and fail.
    idle = {job.job_id for job in jobs if job and job.job_id in at_work and not job.paths.submitted_pickle.exists()}
    _cancel(idle, idle)

    def is_good(job: Any, group: Group) -> bool:
        if job and not Path(job.paths.result_pickle).exists():
            return job.job_id in at_work - idle
        return job and _has_made(job, group, folder)

    with ThreadPoolExecutor() as pool:
        good = list(pool.map(is_good, jobs, groups))
    kept = {group: job for group, job, keep in zip(groups, jobs, good, strict=True) if keep}
    _log.info("attached to %d of %d tokenization tasks", len(kept), len(jobs))
    return kept


def _cancel(jobs: Collection[str], tasks: Collection[str]) -> None:
    """Cancel jobs or tasks, and wait until these tasks have ended: one that is still at work could put its files into
    another's place."""
    if not jobs:
        return
    slurm.cancel(*sorted(jobs))
    begun = time.monotonic()
    while slurm.any_at_work(tasks):
        if time.monotonic() - begun > _ENDING_SECONDS:
            _log.warning("cancelled tasks of %s have not ended after %.0f s", ", ".join(sorted(jobs)), _ENDING_SECONDS)
            return
        time.sleep(_POLL_SECONDS)


def _noted(home: Path) -> tuple[str, list[str | None]]:
    """The groups' key and each one's task; also of an array whose submitter was killed before it noted it down.

    Raises:
        NoAnswer: SLURM does not answer.
    """
    try:
        record = json.loads((home / _RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "", []
    tasks: list[str | None] = record["jobs"]
    missing = [place for place, task in enumerate(tasks) if task is None]
    if missing and (array := slurm.find_by_name(record["name"])):
        for number, place in enumerate(missing):
            tasks[place] = f"{array}_{number}" if len(missing) > 1 else array  # submitit makes no array of one
    return record["groups"], tasks


def _has_made(job: Any, group: Group, folder: Path) -> bool:
    """Whether the task has succeeded and its parts are whole: a disk or a power cut may have damaged them since."""
    outcome, result = pickle_load(job.paths.result_pickle)
    if outcome != "success" or any(isinstance(made, Failure) for made in result):
        return False
    parts = [find_part(PartPaths.of(file, folder), made.made_from) for file, made in zip(group, result, strict=True)]
    return parts == result


def _version(file: InputFile) -> str | int:
    return file.etag if file.location.startswith("s3://") else Path(file.location).stat().st_mtime_ns
