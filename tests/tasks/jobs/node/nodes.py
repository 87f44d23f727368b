"""Jobs of several "nodes" on this machine: a controller each, as on SLURM."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from submitit.core.utils import DelayedSubmission

from infra.processes import ProcessRecord, end_processes
from tasks.jobs.node.plan import NodePlan, Restarts
from tasks.jobs.node.report import ControllerReport
from tasks.jobs.rank import RankTask
from tests.ports import free_port

JOB = "7"


@contextmanager
def job(
    folder: Path,
    function: Callable[..., Any],
    *args: Any,
    nodes: int = 1,
    ranks: int = 1,
    restarts: Restarts | None = None,
    environment: Mapping[str, str] = os.environ,
) -> Iterator[list[subprocess.Popen[bytes]]]:
    """The controllers of a job, while the block lasts; then nothing of it runs any more."""
    folder.mkdir(parents=True, exist_ok=True)
    DelayedSubmission(RankTask(function, args, folder, restarts=restarts)).dump(folder / f"{JOB}_submitted.pkl")
    port, controllers = free_port(), []
    for node in range(nodes):
        plan = NodePlan(folder, JOB, ranks, node, nodes, restarts=restarts, port=port, is_told_to_stop=True)
        command = [sys.executable, "-m", "tasks.jobs.node.controller", plan.to_json()]
        with (folder / f"node-{node}.log").open("ab") as log:
            variables = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
            controllers.append(subprocess.Popen(command, env=environment | variables, stdout=log, stderr=log))
    try:
        yield controllers
    finally:
        for controller in controllers:
            if controller.poll() is None:
                controller.kill()
            controller.wait()
        end_processes(rank_processes(folder, nodes), 0.0)


def rank_processes(folder: Path, nodes: int) -> list[ProcessRecord]:
    """The ranks of the last start, by rank."""
    reports = [ControllerReport.read(folder, node) for node in range(nodes)]
    return [rank for report in reports if report for rank in report.ranks]
