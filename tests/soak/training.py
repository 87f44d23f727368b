"""A training through many jobs, each of which has a controller and ranks; at its end, what is left of it."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from submitit.core.utils import DelayedSubmission

from infra.processes import ProcessRecord, end_processes
from neox_core.config import RunConfig
from neox_core.errors import GO_ON_EXIT_CODE
from neox_core.train.ends.saving import SAVED_FILE
from neox_core.train.job import TrainJob
from tasks.jobs.node.plan import NodePlan, Restarts
from tasks.jobs.rank import RankTask
from tasks.jobs.rank_record import read_failure
from tests.distributed import _process_context
from tests.ports import free_port
from tests.soak.forked import control
from tests.soak.kills import KillList, killed_by
from tests.tasks.jobs.node.nodes import rank_processes

JOB_SECONDS = 1500.0
"""For a job to end, however it ends; longer is stuck."""
RESTARTS = 3


def soak_rank(config: RunConfig, job: TrainJob, kills: Path) -> dict[str, Any]:
    """What each rank runs."""
    from neox_core.train.run import train

    with killed_by(KillList(kills), int(os.environ["RANK"])):
        return train(config, job)


@dataclass
class Lives:
    """How a training's jobs ended, and the processes that they had."""

    jobs: list[int | None] = field(default_factory=list)
    """Exit codes."""
    restarts: int = 0
    """Within jobs."""
    processes: list[ProcessRecord] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    """Of jobs that ended by themselves without success."""


def run_to_end(
    configs: Sequence[RunConfig],
    job: TrainJob,
    folder: Path,
    kills: KillList,
) -> Lives:
    """Submit the training again and again, with one configuration after the other, until a job ends well."""
    lives = Lives()
    while not lives.jobs or lives.jobs[-1] != 0:
        number = len(lives.jobs)
        config = configs[number % len(configs)]
        _run_job(config, job, folder / f"job-{number}", kills, lives)
        assert number < 200, f"no end: {lives.reasons[-5:]}"
    return lives


def _run_job(config: RunConfig, job: TrainJob, folder: Path, kills: KillList, lives: Lives) -> None:
    codes, seen = run_job(config, folder, (config, job, kills.folder), job.output / SAVED_FILE)
    lives.jobs.append(next((code for code in codes if code), codes[0]))
    lives.processes += seen
    if None in codes:
        logs = "\n".join(path.read_text()[-2000:] for path in sorted(folder.glob("*.out")))
        raise AssertionError(f"{folder} is stuck; {kills.next()} was to come:\n{logs}")
    log = (folder / "controller-0.log").read_text()
    lives.restarts += log.count("starting all ranks again")
    if lives.jobs[-1] not in (0, GO_ON_EXIT_CODE, -9):
        failures = [read_failure(folder, 0, rank) for rank in range(config.launch.world_size)]
        lives.reasons.append(f"{[failure.message for failure in failures if failure]} {log[-600:]}")


def run_job(
    config: RunConfig, folder: Path, args: tuple[Any, ...], saved: Path
) -> tuple[list[int | None], list[ProcessRecord]]:
    """A job of `soak_rank`, with a controller for each node; its exit codes by node (None: stuck), and all ranks."""
    folder.mkdir(parents=True)
    again = Restarts(RESTARTS, saved)
    DelayedSubmission(RankTask(soak_rank, args, folder, restarts=again)).dump(folder / "7_submitted.pkl")
    nodes, ranks, port = config.launch.nodes, config.launch.ranks_per_node, free_port()
    controllers = []
    for node in range(nodes):
        plan = NodePlan(folder, "7", ranks, node, nodes, restarts=again, port=port, is_told_to_stop=True)
        log = str(folder / f"controller-{node}.log")
        controllers.append(_process_context().Process(target=control, args=(plan.to_json(), log, dict(os.environ))))
        controllers[-1].start()
    deadline = time.monotonic() + JOB_SECONDS
    seen: dict[int, ProcessRecord] = {}
    while any(controller.exitcode is None for controller in controllers) and time.monotonic() < deadline:
        seen |= {process.pid: process for process in rank_processes(folder, nodes)}
        controllers[0].join(0.2)
    codes = [controller.exitcode for controller in controllers]
    for controller in controllers:
        controller.kill()
        controller.join()
    if None in codes:
        end_processes(seen.values(), 1.0)
    return codes, list(seen.values())


def still_there(processes: Sequence[ProcessRecord], mention: str) -> list[str]:
    """Processes of a training that have outlived it: those that were recorded, and whoever names its folder."""
    deadline = time.monotonic() + 60  # the kernel takes a moment
    while any(process.is_alive() for process in processes) and time.monotonic() < deadline:
        time.sleep(0.1)
    found = [str(process) for process in processes if process.is_alive()]
    for process in psutil.process_iter(["pid", "cmdline"]):
        if mention in " ".join(process.info["cmdline"] or []):
            found.append(str(process.info))
    return found
