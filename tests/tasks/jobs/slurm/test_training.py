"""A training on a real SLURM that is told to stop, in each of SLURM's ways, has saved what it did and goes on there."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from neox_core.checkpoint.manifest import list_checkpoints
from neox_core.config import LaunchConfig, RunConfig, StorageConfig
from neox_core.storage.object_store import ObjectStore
from neox_core.train.ends.saving import SAVED_FILE
from neox_core.train.job import TrainJob
from tasks.jobs.failure import JobFailed
from tasks.jobs.job import Job
from tasks.jobs.launch import find_jobs, submit_or_attach
from tests import waiting
from tests.distributed import rendezvous_ports, run_ranks
from tests.neox_core.train.ends.test_stopping import prepare
from tests.neox_core.train.small_jobs import rows, train_job
from tests.neox_core.train.test_rollback import config
from tests.paths import ROOT

pytestmark = [pytest.mark.slurm, pytest.mark.usefixtures("slurm"), pytest.mark.timeout(1200)]

STEPS = 40
KEY = "0123456789abcdef" * 4

wait_for = partial(waiting.wait_for, seconds=300.0, pause=0.2)


@pytest.fixture(autouse=True)
def _jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No job outlives its test."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    yield
    for job in find_jobs(tmp_path / "jobs", ""):
        job.cancel()


def slow_training(config: RunConfig, job: TrainJob, seconds: float) -> Any:
    """Train with steps of at least so many seconds; a line for each that is begun."""
    from neox_core.train.loop import Loop
    from neox_core.train.run import train

    whole = Loop._step

    def step(self: Loop, number: int, *others: Any) -> None:
        if os.environ["RANK"] == "0":
            with (job.output / "begun").open("a") as file:
                file.write(f"{number}\n")
        time.sleep(seconds)
        whole(self, number, *others)

    with patch.object(Loop, "_step", step):
        return train(config, job)


def begun(job: TrainJob) -> list[int]:
    path = job.output / "begun"
    return [int(line) for line in path.read_text().splitlines()] if path.exists() else []


def submit(run: RunConfig, job: TrainJob, folder: Path, seconds: float, **launch: Any) -> Job:
    job.output.mkdir(exist_ok=True)
    values = {"device": "cpu", "time_limit_minutes": 60, "executor": "slurm", "nodes": 2, "ranks_per_node": 1, **launch}
    arguments = (run, job, seconds)
    saved = job.output / SAVED_FILE
    return submit_or_attach(
        LaunchConfig(**values), folder / "jobs", "test", KEY, slow_training, arguments, 2, 1, saved=saved
    )


def signal_it(job: Job, folder: Path) -> None:
    subprocess.run(["scancel", "--signal=USR2", job.job_id], check=True)


def let_its_time_run_out(job: Job, folder: Path) -> None:
    """It has been told when that is."""


def preempt_it(job: Job, folder: Path) -> None:
    """By a job that needs all nodes, at a higher priority."""
    whole = {"exclusive": True}
    values = LaunchConfig(
        device="cpu", time_limit_minutes=60, executor="slurm", partition="high", slurm_parameters=whole
    )
    submit_or_attach(values, folder / "jobs", "high", "f" * 64, time.sleep, (1,), 4, 1).results()


@pytest.mark.parametrize(
    ("act", "launch", "words"),
    [
        (signal_it, {}, "received SIGUSR2"),
        # submitit has the end announced 90 s before; here what the training has measured is to decide.
        (
            let_its_time_run_out,
            {"time_limit_minutes": 3, "slurm_parameters": {"signal": "USR2@1"}},
            "left of the time limit",
        ),
        # SLURM sends SIGTERM and sbatch's --signal, USR2, at once: either may be the first that is heard.
        (preempt_it, {"partition": "requeue"}, "received SIG"),
        (preempt_it, {"partition": "cancel"}, "received SIG"),
    ],
    ids=["scancel --signal", "time limit", "preempted, requeue", "preempted, cancel"],
)
def test_stopped_and_gone_on(
    storage_config: StorageConfig,
    store: ObjectStore,
    tmp_path: Path,
    act: Callable[[Job, Path], None],
    launch: dict[str, Any],
    words: str,
) -> None:
    run = config(storage_config, steps=STEPS, checkpoint_interval=1000)
    run = run.model_copy(update={"launch": run.launch.model_copy(update={"nodes": 2, "ranks_per_node": 1})})
    whole = prepare(run, tmp_path)
    stopped = replace(whole, fingerprint="b" * 64, output=tmp_path / "stopped")
    run_ranks(train_job, 2, run, whole, None, rendezvous_ports(1)[0])

    job = submit(run, stopped, tmp_path, 4.0 if "time_limit_minutes" in launch else 1.0, **launch)
    wait_for(lambda: len(begun(stopped)) >= 5)
    act(job, tmp_path)
    wait_for(lambda: list_checkpoints(store, stopped.prefix))
    saved = list_checkpoints(store, stopped.prefix)[-1].step
    if launch.get("partition") != "requeue":  # SLURM starts that one again by itself
        with pytest.raises(JobFailed) as failed:
            job.results()
        assert not failed.value.final
    logs = "\n".join(path.read_text() for path in job.log_paths())
    assert f"stopped after step {saved}, which is saved: " in logs
    assert words in logs
    again = submit(run, stopped, tmp_path, 0.0, **launch | {"time_limit_minutes": 60})
    assert [result["started_from_step"] for result in again.results()] == [saved] * 2
    assert begun(stopped) == list(range(1, STEPS + 1))
    values = [{step: row["train/loss"] for step, row in rows(found).items()} for found in (whole, stopped)]
    assert values[0] == values[1]
