"""A scheduler is one class and its name in the configuration: here, one that runs ranks in subprocesses."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path

import pytest
from submitit.core.utils import cloudpickle_dump

from neox_core.config import LaunchConfig
from neox_core.errors import LaunchError
from tasks.jobs.executor import Handle, Resources, Submission
from tasks.jobs.launch import check_launch, find_job, submit_or_attach
from tasks.jobs.registry import register_executor
from tasks.jobs.status import Cause, Status
from tests.paths import ROOT

KEY = "0123456789abcdef" * 4
RANK = "import sys; from submitit.core.utils import pickle_load; pickle_load(sys.argv[1]).run(int(sys.argv[2]))"


class SubprocessExecutor:
    """See `tasks.jobs.executor.Executor`."""

    poll_seconds = 0.0

    def __init__(self) -> None:
        self.ranks: dict[str, list[subprocess.Popen[bytes]]] = {}

    def check(self, resources: Resources) -> None:
        if resources.partition != "desk":
            raise LaunchError(f"there is no partition {resources.partition}: choose desk")

    def submit(self, submission: Submission) -> list[str]:
        ids = [f"{submission.name}-{place}" for place in range(len(submission.tasks))]
        world = submission.resources.ranks
        for job, task in zip(ids, submission.tasks, strict=True):
            path = submission.folder / f"{job}.pkl"
            cloudpickle_dump(task, path)
            self.ranks[job] = [self._start(path, job, rank, world) for rank in range(world)]
        return ids

    def find(self, name: str, folder: Path, count: int) -> list[str | None]:
        return [f"{name}-{place}" if f"{name}-{place}" in self.ranks else None for place in range(count)]

    def states(self, handles: Collection[Handle]) -> dict[Handle, Status]:
        return {handle: self._status([rank.poll() for rank in self.ranks[handle.id]]) for handle in handles}

    def cancel(self, handles: Collection[Handle]) -> None:
        for handle in handles:
            for rank in self.ranks[handle.id]:
                rank.kill()
                rank.wait()

    def log_path(self, handle: Handle, rank: int) -> Path:
        return handle.folder / f"{handle.id}.{rank}.log"

    def killed_ranks(self, handle: Handle) -> dict[int, str]:
        return {}

    def _start(self, task: Path, job: str, rank: int, world: int) -> subprocess.Popen[bytes]:
        environment = os.environ | {"RANK": str(rank), "WORLD_SIZE": str(world), "PYTHONPATH": str(ROOT)}
        with task.with_name(f"{job}.{rank}.log").open("wb") as log:
            return subprocess.Popen(
                [sys.executable, "-c", RANK, task, str(rank)], env=environment, stdout=log, stderr=log
            )

    def _status(self, codes: list[int | None]) -> Status:
        if None in codes:
            return Status("running")
        return Status("failed", Cause.ERROR, f"exit codes {codes}") if any(codes) else Status("completed")


LAUNCH = LaunchConfig(executor="subprocesses", ranks_per_node=2, partition="desk")


def test_a_job_runs_through_a_scheduler_of_ones_own(tmp_path: Path) -> None:
    scheduler = SubprocessExecutor()
    register_executor("subprocesses", lambda: scheduler)
    check_launch(LAUNCH)
    job = submit_or_attach(LAUNCH, tmp_path, "test", KEY, os.getenv, ("RANK",), 1, 2)
    assert submit_or_attach(LAUNCH, tmp_path, "test", KEY, os.getenv, ("RANK",), 1, 2).job_id == job.job_id
    assert job.results() == ["0", "1"]
    found = find_job(tmp_path, KEY)
    assert found is not None
    assert (found.state(), found.results()) == ("completed", ["0", "1"])
    assert len(scheduler.ranks) == 1

    bad = submit_or_attach(LAUNCH, tmp_path, "test", "f" * 64, os.listdir, ("/none",), 1, 1)
    with pytest.raises(LaunchError, match=r"rank 0 first: FileNotFoundError: .*/none.*\(exit codes \[1\]\)"):
        bad.results()


def test_what_a_scheduler_refuses_and_an_unknown_one(tmp_path: Path) -> None:
    register_executor("subprocesses", SubprocessExecutor)
    with pytest.raises(LaunchError, match="there is no partition big: choose desk"):
        check_launch(LAUNCH.model_copy(update={"partition": "big"}))
    with pytest.raises(LaunchError, match=r"there is no executor 'pbs': choose one of auto, .*local, .*slurm"):
        check_launch(LAUNCH.model_copy(update={"executor": "pbs"}))
