"""The processes of a node's ranks, each of which runs the submission's work through submitit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from submitit.core.utils import JobPaths

from infra.processes import ProcessRecord
from tasks.jobs.node.plan import CONTROLLER_VARIABLE, NodePlan

_END_SECONDS = 60.0
"""For the kernel to end a killed process."""
_STOPPED_SECONDS = 30.0
"""For a stopped process to be continued by whoever stopped it."""
_LOOK_SECONDS = 1.0
"""Between two looks for stopped ones."""


class Ranks:
    """The ranks of a node, from one start to their end.

    Args:
        plan: the node's.
        variables: of the environment, in addition.
    """

    def __init__(self, plan: NodePlan, variables: Mapping[str, str]) -> None:
        self._plan, self._variables = plan, variables
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._records: dict[int, ProcessRecord] = {}
        self._stopped_since: dict[int, float] = {}
        self._next_look = 0.0
        self.killed_for: dict[int, str] = {}
        """Why this node's controller has killed ranks, by rank."""

    def start(self) -> list[ProcessRecord]:
        """Start them; their processes, by rank."""
        for local_rank in range(self._plan.ranks):
            self._start(local_rank)
        self._records = {rank: ProcessRecord.of(process.pid) for rank, process in self._processes.items()}
        return list(self._records.values())

    def exits(self) -> dict[int, int]:
        """Exit codes of those that have ended, by rank."""
        codes = {rank: process.poll() for rank, process in self._processes.items()}
        return {rank: code for rank, code in codes.items() if code is not None}

    def send(self, number: signal.Signals) -> None:
        """Send a signal to those that run."""
        for process in self._processes.values():
            process.send_signal(number)

    def kill_stopped(self) -> None:
        """End those that were stopped, as by SIGSTOP, and stayed so: nothing within them can notice it."""
        now = time.monotonic()
        if now < self._next_look:
            return
        self._next_look = now + _LOOK_SECONDS
        stopped = [rank for rank, record in self._records.items() if record.is_stopped()]
        self._stopped_since = {rank: self._stopped_since.get(rank, now) for rank in stopped}
        for rank, since in self._stopped_since.items():
            if now - since > _STOPPED_SECONDS:
                self.killed_for[rank] = f"had been stopped (SIGSTOP) for {now - since:.0f} s and was ended"
                self._processes[rank].kill()

    def kill(self) -> None:
        """End those that run, also stopped ones; returns when all have ended."""
        self.send(signal.SIGKILL)
        for process in self._processes.values():
            process.wait(_END_SECONDS)

    def _start(self, local_rank: int) -> None:
        # SIGUSR2 announces the end. Until submitit's handler is there it would kill Python, so it starts ignored.
        shell = ["sh", "-c", 'trap "" USR2; exec "$@"', "_"]
        command = [*shell, sys.executable, "-u", "-m", "submitit.core._submit", str(self._plan.folder)]
        rank = self._plan.first_rank + local_rank
        with rank_log(self._plan, rank).open("ab") as log:
            self._processes[rank] = subprocess.Popen(command, env=self._environment(rank), stdout=log, stderr=log)

    def _environment(self, rank: int) -> dict[str, str]:
        plan = self._plan
        return os.environ | {
            "SUBMITIT_EXECUTOR": "local",
            "SUBMITIT_LOCAL_JOB_ID": plan.job_id or str(os.getpid()),
            "SUBMITIT_LOCAL_NTASKS": str(plan.nodes * plan.ranks),
            "SUBMITIT_LOCAL_JOB_NUM_NODES": str(plan.nodes),
            "SUBMITIT_LOCAL_NODEID": str(plan.node),
            "SUBMITIT_LOCAL_GLOBALID": str(rank),
            "SUBMITIT_LOCAL_LOCALID": str(rank - plan.first_rank),
            CONTROLLER_VARIABLE: str(os.getpid()),
            **self._variables,
        }


def rank_log(plan: NodePlan, rank: int) -> Path:
    """Where a rank's output goes."""
    return Path(JobPaths(plan.folder, job_id=plan.job_id or str(os.getpid()), task_id=rank).stdout)
