"""Jobs whose identity is a fingerprint: asking twice for the same job yields the same job, not a second one."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import shlex
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import submitit

from infra.processes import ProcessRecord
from neox_core.config import LaunchConfig
from neox_core.errors import LaunchError
from tasks.jobs import local, slurm
from tasks.jobs.job import Job, JobRecord
from tasks.jobs.local_controller import ControllerReport
from tasks.jobs.rank import RankTask

__all__ = ["Job", "check_launch", "find_job", "find_jobs", "submit_or_attach"]

logger = logging.getLogger(__name__)

_LEDGER = "job.json"
_ATTEMPT = "attempt-"


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
) -> Job:
    """Find the job with this key, or submit it: `function(*args)` in every rank, with torchrun's variables set.

    A job that is pending, running or completed is attached to, whoever submitted it; one that ended without success is
    submitted again. What is known of it lies in `folder`/<key>.

    Args:
        folder: on a disk that all nodes share.
        name: what the job does, such as 'train'; part of its name in SLURM.
        key: the fingerprint of the job's work.
        accept_completed: False if what a completed job left elsewhere is gone, so that it must run again.

    Raises:
        LaunchError: the job cannot be submitted.
        NoAnswer: SLURM does not answer. If it has the job all the same, the next call finds that.
    """
    home = folder.resolve() / key
    home.mkdir(parents=True, exist_ok=True)
    job_name = _job_name(name, key)
    attachable = ("pending", "running", "completed") if accept_completed else ("pending", "running")
    with _lock(home):
        if record := _find_record(home, job_name, nodes * ranks_per_node):
            job = Job(record)
            state = job.state()
            if state in attachable:
                logger.info("attached to job %s (%s), %s", record.job_id, job_name, state)
                return job
            logger.info("job %s (%s) %s: submitting it again", record.job_id, job_name, state)
        record = _submit(launch, _next_attempt(home), job_name, function, args, nodes, ranks_per_node)
        record.write(home / _LEDGER)
        logger.info("submitted job %s (%s), logs in %s", record.job_id, job_name, record.folder)
        return Job(record)


def check_launch(launch: LaunchConfig) -> None:
    """Find out whether jobs can be launched here, without launching one.

    Raises:
        LaunchError: SLURM is demanded and absent, or without it there are several nodes or too few GPUs.
    """
    kind = _choose_executor(launch)
    if kind == "local":
        _check_one_node(launch.nodes)
    _gpus_per_node(launch, kind, launch.ranks_per_node)


def find_job(folder: Path, key: str) -> Job | None:
    """The job with this key as it was last submitted; None if it never was."""
    record = JobRecord.read(folder.resolve() / key / _LEDGER)
    return Job(record) if record else None


def find_jobs(folder: Path, name: str, key_prefix: str, ranks: int) -> list[Job]:
    """All jobs whose keys begin so, also one whose submitter died before it could note the job down.

    Args:
        ranks: of each of the jobs.
    """
    jobs = []
    for home in sorted(path.parent for path in folder.resolve().glob(f"{key_prefix}*/lock")):
        with _lock(home):
            if record := _find_record(home, _job_name(name, home.name), ranks):
                jobs.append(Job(record))
    return jobs


def _job_name(name: str, key: str) -> str:
    return f"llemma-{name}-{key[:12]}"


@contextlib.contextmanager
def _lock(home: Path) -> Iterator[None]:
    """One submitter at a time; the kernel unlocks when it dies."""
    with (home / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _submit(
    launch: LaunchConfig,
    folder: Path,
    job_name: str,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    nodes: int,
    ranks_per_node: int,
) -> JobRecord:
    kind = _choose_executor(launch)
    gpus = _gpus_per_node(launch, kind, ranks_per_node)
    task = RankTask(function, args, folder, local_port=_free_port() if kind == "local" else None)
    try:
        executor = _slurm_executor(launch, folder) if kind == "slurm" else _local_executor(folder, nodes)
        executor.update_parameters(
            nodes=nodes,
            tasks_per_node=ranks_per_node,
            gpus_per_node=gpus or None,  # a cluster without GPUs may refuse even 0
            timeout_min=launch.time_limit_minutes,
            stderr_to_stdout=True,
            **(_slurm_parameters(launch, job_name, gpus) if kind == "slurm" else {}),
        )
        job_id = str(executor.submit(task).job_id)
    except OSError as error:
        raise LaunchError(f"{job_name} cannot be submitted: {' '.join(str(error).split())}") from error
    except RuntimeError as error:  # sbatch failed
        raise slurm.failure(f"{job_name} cannot be submitted", str(error)) from error
    controller = ProcessRecord.of(int(job_id)) if kind == "local" else None
    return JobRecord(job_name, job_id, kind, nodes * ranks_per_node, folder, socket.gethostname(), controller)


def _choose_executor(launch: LaunchConfig) -> Literal["slurm", "local"]:
    has_slurm = shutil.which("sbatch") is not None
    if launch.executor == "slurm" and not has_slurm:
        raise LaunchError(
            "launch.executor is slurm, but sbatch is not on the PATH: run on a login node, or set it to auto"
        )
    return "slurm" if has_slurm and launch.executor != "local" else "local"


def _slurm_executor(launch: LaunchConfig, folder: Path) -> Any:
    # SIGUSR2 announces preemption. Until submitit's handler is there it would kill Python, so it starts ignored.
    python = f'sh -c \'trap "" USR2; exec "$@"\' _ {shlex.quote(sys.executable)}'
    return submitit.AutoExecutor(folder, cluster="slurm", slurm_python=python)


def _local_executor(folder: Path, nodes: int) -> Any:
    _check_one_node(nodes)
    return local.LocalExecutor(folder)


def _check_one_node(nodes: int) -> None:
    if nodes > 1:
        raise LaunchError(
            f"launch.nodes is {nodes}, but without SLURM there is one: set it to 1, or run where sbatch is"
        )


def _slurm_parameters(launch: LaunchConfig, job_name: str, gpus: int) -> dict[str, Any]:
    return {
        "name": job_name,
        "cpus_per_task": launch.cpus_per_rank,
        "slurm_partition": launch.partition,
        "slurm_account": launch.account,
        # srun does not take --cpus-per-task over from sbatch (since SLURM 22.05)
        "slurm_srun_args": ["--kill-on-bad-exit=1", f"--cpus-per-task={launch.cpus_per_rank}"],
        "slurm_additional_parameters": launch.slurm_parameters,
        # DeepSpeed looks for devices when it is imported, and would take a GPU that is not ours.
        "slurm_setup": [] if gpus else [f"export {name}={value}" for name, value in local.CPU_ONLY.items()],
    }


def _gpus_per_node(launch: LaunchConfig, kind: str, ranks_per_node: int) -> int:
    """One GPU per rank on SLURM unless the device is cpu; here if there are as many."""
    if launch.device == "cpu":
        return 0
    if kind == "slurm":
        return ranks_per_node
    gpus = local.count_gpus()
    if gpus < ranks_per_node and launch.device == "cuda":
        raise LaunchError(
            f"launch.device is cuda with {ranks_per_node} ranks, but this machine has {gpus} GPUs: "
            f"lower launch.ranks_per_node, or set launch.device to cpu"
        )
    if 0 < gpus < ranks_per_node:
        logger.warning("%d ranks but %d GPUs: the job runs on CPUs", ranks_per_node, gpus)
    return ranks_per_node if gpus >= ranks_per_node else 0


def _attempts(home: Path) -> list[Path]:
    return sorted(home.glob(f"{_ATTEMPT}[0-9]*"))


def _next_attempt(home: Path) -> Path:
    folder = home / f"{_ATTEMPT}{len(_attempts(home)) + 1:04d}"
    folder.mkdir()
    return folder


def _find_record(home: Path, job_name: str, ranks: int) -> JobRecord | None:
    """The newest submission, also if its submitter died before it wrote the ledger, which is made up for here."""
    record, attempts = JobRecord.read(home / _LEDGER), _attempts(home)
    if not attempts or (record and record.folder == attempts[-1]):
        return record
    unrecorded, host = attempts[-1], socket.gethostname()
    if report := ControllerReport.read(unrecorded):
        job_id = str(report.controller.pid)
        record = JobRecord(job_name, job_id, "local", ranks, unrecorded, host, report.controller)
    elif shutil.which("squeue") and (found := slurm.find_by_name(job_name)):
        earlier, record = record, JobRecord(job_name, found, "slurm", ranks, unrecorded, host, None)
        if Job(record).is_without_work():
            slurm.cancel(found)  # sbatch gave its submitter no answer, or the submitter was killed meanwhile
            return earlier
    else:
        return record
    record.write(home / _LEDGER)
    return record


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])
