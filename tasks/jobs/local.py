"""Jobs on this machine: submitit's local executor with our controller."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import submitit

from infra.processes import ProcessRecord, end_processes, wait_for_end
from tasks.jobs.local_controller import ControllerReport

_CANCEL_SECONDS = 10.0

CPU_ONLY = {"DS_ACCELERATOR": "cpu"}
"""Variables that keep DeepSpeed off the GPUs of a machine."""


class LocalExecutor(submitit.LocalExecutor):  # type: ignore[misc]
    """submitit's local executor; the job survives the submitter, and one failed rank ends it."""

    def _submit_command(self, command: str) -> Any:
        ranks = self.parameters.get("tasks_per_node", 1)
        limit_seconds = int(60 * self.parameters["timeout_min"])
        gpus = self.parameters.get("gpus_per_node") or 0
        environment = os.environ | {
            "SUBMITIT_EXECUTOR": "local",
            "SUBMITIT_LOCAL_COMMAND": command,
            "SUBMITIT_LOCAL_NTASKS": str(ranks),
            "SUBMITIT_LOCAL_NODEID": "0",
            "SUBMITIT_LOCAL_JOB_NUM_NODES": "1",
            "SUBMITIT_LOCAL_TIMEOUT_S": str(limit_seconds),
            "SUBMITIT_LOCAL_SIGNAL_DELAY_S": str(min(30, limit_seconds // 2)),
            "SUBMITIT_LOCAL_WITH_SHELL": "",
            "SUBMITIT_STDERR_TO_STDOUT": "1",
            "CUDA_VISIBLE_DEVICES": ",".join(str(gpu) for gpu in range(gpus)),
            **({} if gpus else CPU_ONLY),
        }
        # Its own files, not the submitter's: a pipe that the job holds open would keep the reader waiting. Its
        # session is the submitter's, so that Ctrl-C in the terminal ends the job as well.
        with (Path(self.folder) / "controller.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "tasks.jobs.local_controller", str(self.folder)],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        return submitit.LocalJob(self.folder, str(process.pid), tasks=list(range(ranks)), process=process)


def is_running(folder: Path, controller: ProcessRecord) -> bool:
    """Whether the controller, or a rank that has lost it, still runs."""
    return any(process.is_alive() for process in _processes(folder, controller))


def cancel(folder: Path, controller: ProcessRecord) -> None:
    """End the job's processes and return when they have ended."""
    controller.send(signal.SIGTERM)
    wait_for_end(_processes(folder, controller), _CANCEL_SECONDS)
    end_processes(_processes(folder, controller), _CANCEL_SECONDS)


def count_gpus() -> int:
    """NVIDIA GPUs of this machine, without loading torch."""
    return len(list(Path("/dev").glob("nvidia[0-9]*")))


def _processes(folder: Path, controller: ProcessRecord) -> tuple[ProcessRecord, ...]:
    report = ControllerReport.read(folder)
    return (controller, *report.ranks) if report else (controller,)
