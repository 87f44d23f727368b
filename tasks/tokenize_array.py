"""Parts made by a SLURM job array."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import pickle_load

from neox_core.artifact import write_atomically
from neox_core.config import TokenizeJobConfig
from neox_core.data.part import make_part
from neox_core.data.part_files import PARTS, PartPaths
from neox_core.data.part_settings import PartRecord, PartSettings
from neox_core.data.readers import InputFile
from neox_core.errors import DataError, LaunchError, LlemmaError
from tasks import slurm
from tasks.tokenize_pool import MadeParts

_log = logging.getLogger(__name__)

_MAX_TASKS = 1000  # SLURM's default limit of an array is 1,001
_RECORD = "array.json"
_POLL_SECONDS = 2.0
_ASK_SECONDS = 60.0
"""How often SLURM is asked about a task that has left no result."""
_SHARED_DISK_SECONDS = 15.0


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
        LaunchError: the array cannot be submitted, a task ended without a result, or SLURM does not answer.
    """
    largest_first = sorted(files, key=lambda file: -file.size)
    count = min(len(files), _MAX_TASKS)
    groups = [tuple(largest_first[first::count]) for first in range(count)]
    home = folder.resolve() / PARTS / "jobs"
    key = _key(groups, settings)
    kept = _attach(home, groups, key, folder)
    waiting = kept | _submit(home, [group for group in groups if group not in kept], settings, folder, jobs)
    record = {"groups": key, "jobs": [waiting[group].job_id for group in groups]}
    write_atomically(home / _RECORD, json.dumps(record))
    yield from _results({job: group for group, job in waiting.items()})


def _results(waiting: dict[Any, Group]) -> MadeParts:
    asked = time.monotonic()
    while waiting:
        ask = time.monotonic() - asked > _ASK_SECONDS
        asked = time.monotonic() if ask else asked
        for job in list(waiting):
            if Path(job.paths.result_pickle).exists():
                for file, record in zip(waiting.pop(job), _result(job), strict=True):
                    if isinstance(record, Failure):
                        raise DataError(record.message)
                    yield file, record
            elif ask:
                _check_alive(job)
        if waiting:
            time.sleep(_POLL_SECONDS)


def make_parts(files: Sequence[InputFile], settings: PartSettings, folder: Path) -> list[PartRecord | Failure]:
    """One task's work; a failure is a result, so that its message arrives without a traceback."""
    results: list[PartRecord | Failure] = []
    for file in files:
        try:
            results.append(make_part(file, settings, folder))
        except LlemmaError as error:
            results.append(Failure(str(error)))
    return results


def _submit(
    home: Path, groups: Sequence[Group], settings: PartSettings, folder: Path, jobs: TokenizeJobConfig
) -> dict[Group, Any]:
    if not groups:
        return {}
    executor = _executor(home, jobs)
    try:
        with executor.batch():
            submitted = [executor.submit(make_parts, group, settings, folder.resolve()) for group in groups]
    except (OSError, RuntimeError) as error:
        raise LaunchError(f"the tokenization jobs cannot be submitted: {' '.join(str(error).split())}") from error
    ids = [job.job_id for job in submitted]
    _log.info("submitted %d tokenization tasks (%s to %s), logs in %s", len(ids), ids[0], ids[-1], home)
    return dict(zip(groups, submitted, strict=True))


def _executor(home: Path, jobs: TokenizeJobConfig) -> Any:
    executor = submitit.AutoExecutor(home, cluster="slurm")
    executor.update_parameters(
        name="llemma-tokenize",
        nodes=1,
        tasks_per_node=1,
        cpus_per_task=1,
        mem_gb=jobs.memory_gb,
        timeout_min=jobs.time_limit_minutes,
        stderr_to_stdout=True,
        slurm_array_parallelism=jobs.parallelism,
        slurm_partition=jobs.partition,
        slurm_account=jobs.account,
        slurm_additional_parameters=jobs.slurm_parameters,
    )
    return executor


def _attach(home: Path, groups: Sequence[Group], key: str, folder: Path) -> dict[Group, Any]:
    """The tasks of an earlier call that are at work or have made their parts. If that was for other files or
    settings, they end."""
    try:
        record = json.loads((home / _RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    jobs = [submitit.SlurmJob(home, job_id) for job_id in record["jobs"]]
    if record["groups"] != key:
        for array in {job.job_id.partition("_")[0] for job in jobs if not Path(job.paths.result_pickle).exists()}:
            slurm.cancel(array)
        return {}
    kept = {group: job for group, job in zip(groups, jobs, strict=True) if _is_good(job, group, folder)}
    _log.info("attached to %d of %d tokenization tasks", len(kept), len(jobs))
    return kept


def _is_good(job: Any, group: Group, folder: Path) -> bool:
    path = Path(job.paths.result_pickle)
    if not path.exists():
        return slurm.query_state(job.job_id) in ("pending", "running")
    outcome, result = pickle_load(path)
    if outcome != "success" or any(isinstance(made, Failure) for made in result):
        return False
    return all(PartPaths.of(file, folder).record.exists() for file in group)


def _key(groups: Sequence[Group], settings: PartSettings) -> str:
    """What tasks were given: another run's, or this one's of before a correction, lie in the same folder."""
    files = [[(file.logical_name, file.location, file.size, _version(file)) for file in group] for group in groups]
    content = json.dumps([files, settings.logical(), settings.skip_damaged_files])
    return hashlib.sha256(content.encode()).hexdigest()


def _version(file: InputFile) -> str | int:
    return file.etag if file.location.startswith("s3://") else Path(file.location).stat().st_mtime_ns


def _result(job: Any) -> list[PartRecord | Failure]:
    outcome, result = pickle_load(job.paths.result_pickle)
    if outcome != "success":
        reason = " ".join(str(result).split()[-40:])
        raise LaunchError(f"tokenization task {job.job_id} failed: {reason} (log: {job.paths.stdout})")
    return list(result)


def _check_alive(job: Any) -> None:
    """Raise if SLURM knows that the task has ended, and its result does not appear."""
    if (state := slurm.query_state(job.job_id)) in ("pending", "running"):
        return
    deadline = time.monotonic() + _SHARED_DISK_SECONDS
    while not Path(job.paths.result_pickle).exists():
        if time.monotonic() > deadline:
            raise LaunchError(
                f"tokenization task {job.job_id} ended ({state}) without a result: see {job.paths.stdout}, then run "
                "again; finished files are kept"
            )
        time.sleep(0.5)
