"""A submitted job: what state it is in, what its ranks returned, or which of them failed first and why."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from submitit.core.utils import JobPaths, pickle_load

from infra.processes import ProcessRecord
from neox_core.errors import LaunchError
from neox_core.storage.atomic import write_atomically
from tasks.jobs import local, slurm
from tasks.jobs.local_controller import ControllerReport
from tasks.jobs.rank import RankFailure, read_failure

State = Literal["pending", "running", "completed", "failed", "cancelled"]

_POLL_SECONDS = {"local": 0.5, "slurm": 15.0}
_SLURM_ANSWER_SECONDS = 5.0
"""How long SLURM's answer is good for, so that a caller may ask often."""
_SHARED_DISK_SECONDS = 15.0
"""Time until a file written on another node is seen here."""


@dataclass(frozen=True)
class JobRecord:
    """What must be remembered to find a job again."""

    name: str
    job_id: str
    executor: Literal["local", "slurm"]
    ranks: int
    folder: Path
    """This submission's own folder: a local job's id is a pid, which may come again."""
    host: str
    controller: ProcessRecord | None
    """Of a local job."""

    @classmethod
    def read(cls, path: Path) -> JobRecord | None:
        """Read a ledger; None if there is none."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        controller = content.pop("controller")
        content["folder"] = path.parent / content["folder"]
        return cls(**content, controller=ProcessRecord(**controller) if controller else None)

    def write(self, path: Path) -> None:
        """Write the ledger; the folder is stored relative to it."""
        content = asdict(self) | {"folder": self.folder.name}
        write_atomically(path, json.dumps(content, indent=1))


class Job:
    """A job that was submitted by this process or another one, dead or alive."""

    def __init__(self, record: JobRecord) -> None:
        self.record = record
        self._answer: tuple[float, slurm.SlurmState] = (float("-inf"), "unknown")

    @property
    def job_id(self) -> str:
        """SLURM's id of the job; for a local job the pid of its controller."""
        return self.record.job_id

    def state(self) -> State:
        """Ask SLURM, or look at the local job's processes and results.

        Raises:
            NoAnswer: SLURM does not answer.
            LaunchError: a local job belongs to another host.
        """
        record = self.record
        if record.executor == "slurm":
            asked, state = self._answer
            if time.monotonic() - asked > _SLURM_ANSWER_SECONDS:
                state = slurm.query_state(record.job_id)
                self._answer = time.monotonic(), state
            return self._ended_state() if state == "unknown" else state
        if record.host != socket.gethostname() and not self._all_succeeded():
            raise LaunchError(
                f"{self} was started on host {record.host} and cannot be watched from {socket.gethostname()}: "
                f"go on there, or, if it has ended, delete {record.folder.parent / 'job.json'}"
            )
        if record.controller and local.is_running(record.folder, record.controller):
            return "running"
        return self._ended_state()

    def done(self) -> bool:
        """Whether the job has ended, well or not."""
        return self.state() not in slurm.AT_WORK

    def while_at_work(self) -> Iterator[State | None]:
        """The job's state, asked anew each time, until it has ended; None while SLURM does not answer.

        Raises:
            LaunchError: SLURM does not answer for long, or a local job belongs to another host.
        """
        retry_policy = slurm.RetryPolicy()
        while (state := retry_policy.ask(self.state)) in (None, *slurm.AT_WORK):
            yield state

    def results(self) -> list[Any]:
        """Wait for the job to end; what the function returned in each rank, by rank.

        Raises:
            LaunchError: the job was cancelled or failed; says which rank failed first, how, and where its log is. Or
                SLURM does not answer for long.
        """
        retry_policy = slurm.RetryPolicy()
        while (state := retry_policy.wait_for(self.state)) in slurm.AT_WORK:
            time.sleep(_POLL_SECONDS[self.record.executor])
        if state != "completed":
            raise LaunchError(self._explain(state))
        return [self._load_result(rank) for rank in range(self.record.ranks)]

    def is_without_work(self) -> bool:
        """Whether its ranks will not find what to do: submitit lays it where they look after sbatch has answered."""
        return self.record.executor == "slurm" and not Path(self._paths(0).submitted_pickle).exists()

    def cancel(self) -> None:
        """End the job; returns at once on SLURM, and when all processes have ended otherwise."""
        record = self.record
        if self.done():
            return
        if record.executor == "slurm":
            slurm.cancel(record.job_id)
            self._answer = float("-inf"), "unknown"
        elif record.controller:
            write_atomically(record.folder / "cancelled", "")
            local.cancel(record.folder, record.controller)

    def log_paths(self) -> list[Path]:
        """Each rank's log, by rank; a file appears when its rank starts."""
        return [Path(self._paths(rank).stdout) for rank in range(self.record.ranks)]

    def __str__(self) -> str:
        return f"job {self.job_id} ({self.record.name})"

    def _paths(self, rank: int) -> Any:
        return JobPaths(self.record.folder, job_id=self.job_id, task_id=rank)

    def _ended_state(self) -> State:
        if self._all_succeeded():
            return "completed"
        return "cancelled" if (self.record.folder / "cancelled").exists() else "failed"

    def _all_succeeded(self) -> bool:
        paths = [Path(self._paths(rank).result_pickle) for rank in range(self.record.ranks)]
        return all(path.exists() and pickle_load(path)[0] == "success" for path in paths)

    def _load_result(self, rank: int) -> Any:
        path = Path(self._paths(rank).result_pickle)
        deadline = time.monotonic() + _SHARED_DISK_SECONDS
        while not path.exists():
            if time.monotonic() > deadline:
                raise LaunchError(f"{self} completed, but rank {rank} left no result in {path}")
            time.sleep(0.5)
        return pickle_load(path)[1]

    def _explain(self, state: State) -> str:
        if state == "cancelled":
            return f"{self} was cancelled; logs are in {self.record.folder}"
        rank, reason = self._first_failure()
        if rank is None:
            return f"{self} failed: {reason}; logs are in {self.record.folder}"
        return f"{self} failed, rank {rank} first: {reason} (log: {self.log_paths()[rank]})"

    def _first_failure(self) -> tuple[int | None, str]:
        """Rank and reason. A rank that was killed comes before those that noticed it and raised an error."""
        ranks = range(self.record.ranks)
        failures = [failure for rank in ranks if (failure := read_failure(self.record.folder, rank))]
        report = ControllerReport.read(self.record.folder)
        recorded = {failure.rank for failure in failures}
        for rank, code in report.exits if report else ():
            if code and rank not in recorded:
                ending = f"killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
                return rank, f"{ending} without a Python error; last words: {self._last_words(rank)}"
        if failures:
            first: RankFailure = min(failures, key=lambda failure: failure.time)
            return first.rank, first.message
        if report and report.timed_out:
            return None, "its time limit (launch.time_limit_minutes) is over"
        return None, (
            "it ended without a word from any rank (killed, out of memory, hung, or over its time limit); "
            f"last words of rank 0: {self._last_words(0)}"
        )

    def _last_words(self, rank: int) -> str:
        try:
            lines = self.log_paths()[rank].read_text(errors="replace").split("\n")
        except FileNotFoundError:
            return "none"
        return " | ".join(line.strip() for line in lines if line.strip())[-500:] or "none"
