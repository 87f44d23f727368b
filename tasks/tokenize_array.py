"""Parts made by a SLURM job array."""

from __future__ import annotations

import hashlib
import json
import logging
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import submitit
from submitit.core.utils import pickle_load

from neox_core.artifact import write_atomically
from neox_core.config import TokenizeJobConfig
from neox_core.data.part import find_part, make_part
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
"""How often SLURM is asked about the tasks that have left no result."""
_UNANSWERED = 10
"""Questions in a row that SLURM may leave unanswered before the stage ends."""
_AT_WORK = ("pending", "running")
_SHARED_DISK_SECONDS = 15.0


_Answer = TypeVar("_Answer")
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
    home, key = _home(folder), _key(groups, settings)
    kept = _attach(home, groups, key, folder)
    missing = [group for group in groups if group not in kept]
    # Unlike an earlier array's, which may be at work still. Noted down first, so that the array is found by it if this
    # process is killed before it has noted down the array's id.
    name = f"llemma-tokenize-{key[:12]}-{uuid.uuid4().hex[:8]}"
    _note(home, key, [kept[group].job_id if group in kept else None for group in groups], name)
    submitted = _submit(_executor(home, jobs, name), home, missing, settings, folder) if missing else {}
    waiting = kept | submitted
    _note(home, key, [waiting[group].job_id for group in groups], name)
    yield from _results({job: group for group, job in waiting.items()})


def job_arrays(folder: Path) -> list[slurm.JobArray]:
    """The arrays that may be at work on the parts in this folder.

    Raises:
        LaunchError: SLURM does not answer.
    """
    home, arrays = _home(folder), defaultdict[str, list[str]](list)
    for task in filter(None, _noted(home)[1]):
        if not Path(submitit.SlurmJob(home, task).paths.result_pickle).exists():
            arrays[slurm.array_of(task)].append(task)
    return [slurm.JobArray("tokenize", array, tuple(tasks)) for array, tasks in arrays.items()]


def _home(folder: Path) -> Path:
    return folder.resolve() / PARTS / "jobs"


def _results(waiting: dict[Any, Group]) -> MadeParts:
    asked, patience = time.monotonic(), _Patience()
    while waiting:
        states: Mapping[str, slurm.SlurmState] = {}
        if time.monotonic() - asked > _ASK_SECONDS:
            states = patience.ask(lambda: slurm.task_states([job.job_id for job in waiting])) or {}
            asked = time.monotonic()
        for job in list(waiting):
            if Path(job.paths.result_pickle).exists():
                for file, record in zip(waiting.pop(job), _result(job), strict=True):
                    if isinstance(record, Failure):
                        raise DataError(record.message)
                    yield file, record
            elif (state := states.get(job.job_id, "running")) not in _AT_WORK:
                _await_result(job, state)
        if waiting:
            time.sleep(_POLL_SECONDS)


class _Patience:
    """Asks SLURM, and passes over some questions in a row that it does not answer."""

    def __init__(self) -> None:
        self._unanswered = 0

    def ask(self, question: Callable[[], _Answer]) -> _Answer | None:
        """The answer, or None if there is none for now.

        Raises:
            LaunchError: there was none too often.
        """
        try:
            answer = question()
        except LaunchError as error:
            self._unanswered += 1
            if self._unanswered >= _UNANSWERED:
                raise LaunchError(
                    f"{error} (asked {_UNANSWERED} times; the tasks go on, finished files are kept)"
                ) from None
            _log.warning("%s (%d of %d times)", error, self._unanswered, _UNANSWERED)
            return None
        self._unanswered = 0
        return answer


def _ask_until_answered(question: Callable[[], _Answer]) -> _Answer:
    patience = _Patience()
    while (answer := patience.ask(question)) is None:
        time.sleep(_ASK_SECONDS)
    return answer


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
    executor: Any, home: Path, groups: Sequence[Group], settings: PartSettings, folder: Path
) -> dict[Group, Any]:
    try:
        with executor.batch():
            submitted = [executor.submit(make_parts, group, settings, folder.resolve()) for group in groups]
    except (OSError, RuntimeError) as error:
        raise LaunchError(f"the tokenization jobs cannot be submitted: {' '.join(str(error).split())}") from error
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


def _note(home: Path, key: str, tasks: Sequence[str | None], name: str) -> None:
    """Write down each group's task; those that have none yet are being submitted as an array of that name."""
    write_atomically(home / _RECORD, json.dumps({"groups": key, "jobs": tasks, "name": name}))


def _noted(home: Path) -> tuple[str, list[str | None]]:
    """The groups' key and each one's task; also of an array whose submitter was killed before it noted it down.

    Raises:
        LaunchError: SLURM does not answer.
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


def _attach(home: Path, groups: Sequence[Group], key: str, folder: Path) -> dict[Group, Any]:
    """The tasks of an earlier call that are at work or have made their parts. If that was for other files or
    settings, they end."""
    noted_key, tasks = _ask_until_answered(lambda: _noted(home))
    jobs = [submitit.SlurmJob(home, task) if task else None for task in tasks]
    unfinished = [job.job_id for job in jobs if job and not Path(job.paths.result_pickle).exists()]
    states = _ask_until_answered(lambda: slurm.task_states(unfinished))
    if noted_key != key:
        for array in sorted({slurm.array_of(task) for task, state in states.items() if state in _AT_WORK}):
            slurm.cancel(array)
        return {}

    def is_good(job: Any, group: Group) -> bool:
        if job and not Path(job.paths.result_pickle).exists():
            # Without its pickle, which submitit moves there after sbatch, the task will fail.
            return states.get(job.job_id) in _AT_WORK and Path(job.paths.submitted_pickle).exists()
        return job and _has_made(job, group, folder)

    with ThreadPoolExecutor() as pool:
        good = list(pool.map(is_good, jobs, groups))
    kept = {group: job for group, job, keep in zip(groups, jobs, good, strict=True) if keep}
    _log.info("attached to %d of %d tokenization tasks", len(kept), len(jobs))
    return kept


def _has_made(job: Any, group: Group, folder: Path) -> bool:
    """Whether the task has succeeded and its parts are whole: a disk or a power cut may have damaged them since."""
    outcome, result = pickle_load(job.paths.result_pickle)
    if outcome != "success" or any(isinstance(made, Failure) for made in result):
        return False
    parts = [find_part(PartPaths.of(file, folder), made.made_from) for file, made in zip(group, result, strict=True)]
    return parts == result


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
