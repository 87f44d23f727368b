"""Starts the ranks of a local job, and ends all of them when one fails.

`python -m tasks.jobs.local_controller FOLDER`, started by `tasks.jobs.local`. submitit's own controller waits for every
task, so that ranks whose peer has died could wait in a collective for ever.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from submitit.local.local import Controller, LocalJobEnvironment

from infra.processes import ProcessRecord
from neox_core.storage.atomic import write_atomically
from tasks.jobs.rank import CONTROLLER_VARIABLE

_POLL_SECONDS = 0.05
_FAILURE_GRACE_SECONDS = 5.0
"""Time for the other ranks to notice a failed one by themselves and say what they saw."""


@dataclass
class ControllerReport:
    """What a local job's controller knows: its processes, and exit codes in the order in which ranks ended."""

    controller: ProcessRecord
    ranks: list[ProcessRecord] = field(default_factory=list)
    exits: list[tuple[int, int]] = field(default_factory=list)
    """(rank, exit code); ranks that the controller itself ended are not among them."""
    timed_out: bool = False

    @classmethod
    def read(cls, folder: Path) -> ControllerReport | None:
        """The report of the controller in `folder`; None before it has started."""
        try:
            content = json.loads(_report_file(folder).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        return cls(
            controller=ProcessRecord(**content["controller"]),
            ranks=[ProcessRecord(**record) for record in content["ranks"]],
            exits=[(rank, code) for rank, code in content["exits"]],
            timed_out=content["timed_out"],
        )

    def write(self, folder: Path) -> None:
        """Replace the report in `folder`."""
        write_atomically(_report_file(folder), json.dumps(asdict(self)))


def _report_file(folder: Path) -> Path:
    return folder / "controller.json"


class FailFastController(Controller):  # type: ignore[misc]
    """submitit's controller, but the first failed rank ends the job, and so does SIGTERM."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._starting = self._told_to_end = False
        signal.signal(signal.SIGTERM, self._end)
        self._report = ControllerReport(ProcessRecord.of(os.getpid()))
        self._report.write(folder)

    def start_tasks(self) -> None:
        """Start the ranks and record their processes. A signal waits meanwhile: it would forget a rank half started."""
        os.environ[CONTROLLER_VARIABLE] = str(os.getpid())
        self._starting = True
        super().start_tasks()
        self._report.ranks = [ProcessRecord.of(task.pid) for task in self.tasks]
        self._report.write(self.folder)
        self._starting = False
        if self._told_to_end:
            self._end(signal.SIGTERM, None)

    def wait(self, freq: int = 24) -> list[int | None]:
        """Wait until all ranks have ended, one has failed and its grace is over, or the time is up.

        Returns:
            Exit codes; None for ranks that still run, which `run` then ends.
        """
        start = time.monotonic()
        failed_at: float | None = None
        warned = False
        while len(self._report.exits) < self.ntasks:
            if self._note_exits() and failed_at is None:
                failed_at = time.monotonic()
            seconds = time.monotonic() - start
            if failed_at is not None and time.monotonic() - failed_at > _FAILURE_GRACE_SECONDS:
                break
            if seconds > self.timeout_s:
                self._report.timed_out = True
                self._report.write(self.folder)
                break
            if seconds > self.timeout_s - self.signal_delay_s and not warned:
                warned = True
                self._forward_signal(LocalJobEnvironment._usr_sig())
            time.sleep(_POLL_SECONDS)
        return [task.poll() for task in self.tasks]

    def _note_exits(self) -> bool:
        """Record ranks that have ended since the last look; True if any has failed so far."""
        known = {rank for rank, _ in self._report.exits}
        codes = [(rank, task.poll()) for rank, task in enumerate(self.tasks)]
        new = [(rank, code) for rank, code in codes if code is not None and rank not in known]
        if new:
            self._report.exits += new
            self._report.write(self.folder)
        return any(code for _, code in self._report.exits)

    def _end(self, signum: int, frame: Any) -> None:
        self._told_to_end = True
        if not self._starting:
            sys.exit(128 + signum)  # `run` ends the ranks on the way out


def main() -> None:
    """Run the job that the environment describes."""
    FailFastController(Path(sys.argv[1])).run()


if __name__ == "__main__":
    main()
