"""The SLURM executor, by submitit: a job, or a job array of several tasks."""

from __future__ import annotations

import logging
import shlex
import shutil
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import JobPaths

from neox_core.errors import LaunchError
from tasks.jobs.executor import Handle, Resources, Submission
from tasks.jobs.local import CPU_ONLY
from tasks.jobs.node.report import ControllerReport, exits_of
from tasks.jobs.slurm import commands
from tasks.jobs.slurm.states import cause_in_log, ranks_in_log
from tasks.jobs.status import Status

_log = logging.getLogger(__name__)

_LOG_BYTES = 1_000_000
"""Of a log's end, where srun says how ranks ended."""


class SlurmExecutor:
    """Submits to SLURM; see `tasks.jobs.executor.Executor`."""

    poll_seconds = 5.0

    def check(self, resources: Resources) -> None:
        """Raise a LaunchError if there is no SLURM here, or it knows no such partition, account or QOS."""
        _check_present()
        names = {"partition": resources.partition, "account": resources.account}
        names |= {name: resources.parameters.get(name) for name in ("qos", "reservation")}
        commands.check_names(names, resources.time_limit_minutes)

    def submit(self, submission: Submission) -> list[str]:
        """One sbatch, for a job or an array."""
        _check_present()
        try:
            executor = _submitit_executor(submission)
            with executor.batch():
                jobs = [executor.submit(task) for task in submission.tasks]
        except OSError as error:
            reason = commands.one_line(str(error))
            raise LaunchError(f"{submission.name} cannot be submitted: {reason}") from error
        except RuntimeError as error:  # sbatch failed
            raise commands.failure(f"{submission.name} cannot be submitted", str(error)) from error
        return [str(job.job_id) for job in jobs]

    def find(self, name: str, folder: Path, count: int) -> list[str | None]:
        """By the name in squeue. A task is of use if submitit came to lay down its work where it looks for it: it does
        so after sbatch has answered. Others are cancelled."""
        lost: list[str | None] = [None] * count
        # What has ended meanwhile is no longer in squeue, but its work lies in the folder.
        job = _array_with_work(folder) or (commands.find_by_name(name) if shutil.which("squeue") else None)
        if job is None:
            return lost
        ids = [f"{job}_{number}" for number in range(count)] if count > 1 else [job]  # submitit makes no array of one
        found = [task if Path(_paths(folder, task).submitted_pickle).exists() else None for task in ids]
        idle = [task for task, kept in zip(ids, found, strict=True) if kept is None]
        if idle:
            _log.warning("cancelling %d tasks of %s that did not get their work", len(idle), job)
            commands.cancel([job] if len(idle) == count else idle)
        return found

    def states(self, handles: Collection[Handle]) -> dict[Handle, Status]:
        """Ask squeue, then sacct about what squeue does not know; where that says FAILED only, look into the log."""
        states = commands.task_states({handle.id for handle in handles})
        return {handle: self._explained(handle, states[handle.id]) for handle in handles}

    def cancel(self, handles: Collection[Handle]) -> None:
        """scancel; returns at once."""
        commands.cancel(sorted({handle.id for handle in handles}))

    def log_path(self, handle: Handle, rank: int) -> Path:
        """As submitit names it."""
        return Path(_paths(handle.folder, handle.id, rank).stdout)

    def killed_ranks(self, handle: Handle) -> dict[int, str]:
        """By the reports of the nodes' controllers, or else by srun's lines in the log of rank 0."""
        has_controllers = ControllerReport.read(handle.folder) is not None
        return exits_of(handle.folder) if has_controllers else ranks_in_log(self._log(handle))

    def _explained(self, handle: Handle, status: Status) -> Status:
        if status.state != "failed" or "SLURM: FAILED" not in status.reason:
            return status
        cause = cause_in_log(self._log(handle)) or status.cause
        return Status(status.state, cause, status.reason)

    def _log(self, handle: Handle) -> str:
        try:
            with self.log_path(handle, 0).open("rb") as file:
                file.seek(max(0, file.seek(0, 2) - _LOG_BYTES))
                return file.read().decode(errors="replace")
        except FileNotFoundError:
            return ""


def _check_present() -> None:
    if shutil.which("sbatch") is None:
        raise LaunchError(
            "launch.executor is slurm, but sbatch is not on the PATH: run on a login node, or set it to auto"
        )


def _paths(folder: Path, job_id: str, rank: int = 0) -> Any:
    return JobPaths(folder, job_id=job_id, task_id=rank)


def _array_with_work(folder: Path) -> str | None:
    """Id of the job or array whose work submitit has laid down in the folder."""
    work = next(iter(folder.glob("*_submitted.pkl")), None)
    return commands.array_of(work.name.removesuffix("_submitted.pkl")) if work else None


def _requeue(wanted: Resources) -> dict[str, Any]:
    """SLURM starts the job again after a node's failure or a preemption, unless the configuration says no_requeue."""
    return {} if "no_requeue" in wanted.parameters else {"requeue": True}


class _AnywhereExecutor(submitit.SlurmExecutor):  # type: ignore[misc]
    """submitit's, which can be made where there is no srun."""

    @classmethod
    def affinity(cls) -> int:
        """As where there is one."""
        return 1


def script(submission: Submission) -> str:
    """The sbatch script of a submission of one task, without SLURM."""
    executor = _submitit_executor(submission, _AnywhereExecutor)
    return str(executor._make_submission_file_text(executor._submitit_command_str, "script"))


def _submitit_executor(submission: Submission, kind: Any = submitit.SlurmExecutor) -> Any:
    # SIGUSR2 announces preemption. Until submitit's handler is there it would kill Python, so it starts ignored.
    python = f'sh -c \'trap "" USR2; exec "$@"\' _ {shlex.quote(sys.executable)}'
    executor = kind(submission.folder, python=python)
    wanted = submission.resources
    gpus = 0 if wanted.gpus == "cpu" else wanted.ranks_per_node
    # With a controller, a node has one task, which starts the ranks.
    tasks, ranks_per_task = (1, wanted.ranks_per_node) if wanted.restarts else (wanted.ranks_per_node, 1)
    cpus = wanted.parameters.get("cpus_per_task", ranks_per_task * wanted.cpus_per_rank)
    options = {
        "gpus_per_node": gpus or None,  # a cluster without GPUs may refuse even 0
        "mem": f"{wanted.memory_gb}G" if wanted.memory_gb else None,
        "partition": wanted.partition,
        "account": wanted.account,
        "array_parallelism": wanted.parallelism,
    }
    executor.update_parameters(
        job_name=submission.name,
        nodes=wanted.nodes,
        ntasks_per_node=tasks,
        cpus_per_task=cpus,
        time=wanted.time_limit_minutes,
        stderr_to_stdout=True,
        # srun does not take --cpus-per-task over from sbatch (since SLURM 22.05)
        srun_args=["--kill-on-bad-exit=1", f"--cpus-per-task={cpus}"],
        additional_parameters=_requeue(wanted) | dict(wanted.parameters),
        # DeepSpeed looks for devices when it is imported, and would take a GPU that is not ours.
        setup=[] if gpus else [f"export {name}={value}" for name, value in CPU_ONLY.items()],
        **{name: value for name, value in options.items() if value is not None},
    )
    return executor
