"""Parts made by a SLURM job array."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import pickle_load

from neox_core.config import TokenizeJobConfig
from neox_core.data.tokenization.part import make_part
from neox_core.data.tokenization.part_settings import PartRecord, PartSettings
from neox_core.data.tokenization.readers import InputFile
from neox_core.errors import DataError, LaunchError, LlemmaError
from tasks.jobs import slurm
from tasks.tokenization.pool import MadeParts
from tasks.tokenization.record import Failure, Group, attach, home_of, key_of, note

_log = logging.getLogger(__name__)

_MAX_TASKS = 1000  # SLURM's default limit of an array is 1,001
_POLL_SECONDS = 2.0
_ASK_SECONDS = 60.0
"""How often SLURM is asked about the tasks that have left no result."""
_SHARED_DISK_SECONDS = 15.0


def made_in_jobs(
    files: Sequence[InputFile], settings: PartSettings, folder: Path, jobs: TokenizeJobConfig
) -> MadeParts:
    """Make the files' parts in a job array; tasks that an earlier call of this stage submitted are kept, unless they
    failed.

    Raises:
        DataError: the first failure that a task reports; finished parts are kept.
        LaunchError: the array cannot be submitted, a task ended without a result, or SLURM does not answer for long.
    """
    largest_first = sorted(files, key=lambda file: -file.size)
    count = min(len(files), _MAX_TASKS)
    groups = [tuple(largest_first[first::count]) for first in range(count)]
    waiting = slurm.RetryPolicy().wait_for(lambda: _attach_or_submit(groups, settings, folder, jobs))
    yield from _results({job: group for group, job in waiting.items()})


def make_parts(files: Sequence[InputFile], settings: PartSettings, folder: Path) -> list[PartRecord | Failure]:
    """One task's work; a failure is a result, so that its message arrives without a traceback."""
    results: list[PartRecord | Failure] = []
    for file in files:
        try:
            results.append(make_part(file, settings, folder))
        except LlemmaError as error:
            results.append(Failure(str(error)))
    return results


def _attach_or_submit(
    groups: Sequence[Group], settings: PartSettings, folder: Path, jobs: TokenizeJobConfig
) -> dict[Group, Any]:
    """Each group's task.

    Raises:
        NoAnswer: SLURM does not answer. If it has the array all the same, the next call finds that.
    """
    home, key = home_of(folder), key_of(groups, settings)
    kept = attach(home, groups, key, folder)
    missing = [group for group in groups if group not in kept]
    if not missing:
        return kept
    # Unlike an earlier array's, which may be at work still. Noted down first, so that the array is found by it if this
    # process is killed before it has noted down the array's id.
    name = f"llemma-tokenize-{key[:12]}-{uuid.uuid4().hex[:8]}"
    note(home, key, [kept[group].job_id if group in kept else None for group in groups], name)
    tasks = kept | _submit(_executor(home, jobs, name), home, missing, settings, folder)
    note(home, key, [tasks[group].job_id for group in groups], name)
    return tasks


def _results(waiting: dict[Any, Group]) -> MadeParts:
    asked, retry_policy = time.monotonic(), slurm.RetryPolicy()
    while waiting:
        states: Mapping[str, slurm.SlurmState] = {}
        if time.monotonic() - asked > _ASK_SECONDS:
            states = retry_policy.ask(lambda: slurm.task_states([job.job_id for job in waiting])) or {}
            asked = time.monotonic()
        for job in list(waiting):
            if Path(job.paths.result_pickle).exists():
                for file, record in zip(waiting.pop(job), _result(job), strict=True):
                    if isinstance(record, Failure):
                        raise DataError(record.message)
                    yield file, record
            elif (state := states.get(job.job_id, "running")) not in slurm.AT_WORK:
                _await_result(job, state)
        if waiting:
            time.sleep(_POLL_SECONDS)


def _submit(
    executor: Any, home: Path, groups: Sequence[Group], settings: PartSettings, folder: Path
) -> dict[Group, Any]:
    try:
        with executor.batch():
            submitted = [executor.submit(make_parts, group, settings, folder.resolve()) for group in groups]
    except OSError as error:
        raise LaunchError(f"the tokenization jobs cannot be submitted: {error}") from error
    except RuntimeError as error:  # sbatch failed
        raise slurm.failure("the array of tokenization jobs cannot be submitted", str(error)) from error
    ids = [job.job_id for job in submitted]
    _log.info("submitted %d tokenization tasks (%s to %s), logs in %s", len(ids), ids[0], ids[-1], home)
    return dict(zip(groups, submitted, strict=True))


def _executor(home: Path, jobs: TokenizeJobConfig, name: str) -> Any:
    executor = submitit.AutoExecutor(home, cluster="slurm")
    executor.update_parameters(
        name=name,
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


def _result(job: Any) -> list[PartRecord | Failure]:
    outcome, result = pickle_load(job.paths.result_pickle)
    if outcome != "success":
        reason = " ".join(str(result).split()[-40:])
        raise LaunchError(f"tokenization task {job.job_id} failed: {reason} (log: {job.paths.stdout})")
    return list(result)


def _await_result(job: Any, state: slurm.SlurmState) -> None:
    """Wait for the result of a task that has ended; raise if it does not appear."""
    deadline = time.monotonic() + _SHARED_DISK_SECONDS
    while not Path(job.paths.result_pickle).exists():
        if time.monotonic() > deadline:
            raise LaunchError(
                f"tokenization task {job.job_id} ended ({state}) without a result: see {job.paths.stdout}, then run "
                "again; finished files are kept"
            )
        time.sleep(0.5)
