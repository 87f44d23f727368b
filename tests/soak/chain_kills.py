"""Whom kill -9 can meet while a chain runs on SLURM: its flows, the services, SLURM's and the job's processes."""

from __future__ import annotations

import os
import re
import signal
import stat
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from shutil import which

import httpx
import psutil

from infra.prefect.services import ServiceRecord
from tasks.follow import last_step
from tasks.jobs.node.report import ControllerReport
from tests import waiting
from tests.e2e.runs import Run
from tests.infra.test_prefect_deployments import Prefect, flow_processes
from tests.paths import ROOT

AT_SBATCH = "LLEMMA_KILLED_AT_SBATCH"
"""In the environment: a file that says where the next sbatch of a training kills who called it."""
_SBATCH = """#!/bin/sh
# The real sbatch; a training's is told by a file to kill its caller before the job is there, or before it is told so.
for script; do :; done
if [ -e "$LLEMMA_KILLED_AT_SBATCH" ] && grep -qs "job-name=llemma-train" "$script"; then
    point=$(cat "$LLEMMA_KILLED_AT_SBATCH")
    rm "$LLEMMA_KILLED_AT_SBATCH"
    [ "$point" = before ] || REAL "$@" >/dev/null
    kill -9 "$PPID"
    exit 1
fi
exec REAL "$@"
"""

wait_for = partial(waiting.wait_for, seconds=900.0, pause=0.5)


@contextmanager
def sbatch_that_kills(folder: Path) -> Iterator[Path]:
    """Put such an sbatch on the PATH; the file that tells it what to do."""
    real = which("sbatch")
    assert real
    folder.mkdir()
    (folder / "sbatch").write_text(_SBATCH.replace("REAL", real))
    (folder / "sbatch").chmod(stat.S_IRWXU)
    told, before = folder / "kill-at", os.environ["PATH"]
    os.environ |= {"PATH": f"{folder}:{before}", AT_SBATCH: str(told)}
    try:
        yield told
    finally:
        os.environ["PATH"] = before
        del os.environ[AT_SBATCH]


@dataclass(frozen=True)
class ChainKills:
    """Kills what belongs to one run's chain. Each method returns when there was something to kill, and it is dead."""

    prefect: Prefect
    run: Run
    slurm: Path
    """SLURM's folder."""
    told: Path
    """See `sbatch_that_kills`."""

    def engine(self, flow: str) -> None:
        """The process of a flow's newest run."""
        self._wait_and_kill(lambda: self._engines(flow))

    def service(self, name: str) -> None:
        """Prefect's server or worker, not its keeper."""

        def found() -> list[psutil.Process]:
            record = ServiceRecord.read(self.prefect.folder / "home", name)
            return _processes([record.service.pid] if record and record.service else [])

        self._wait_and_kill(found)

    def watcher(self) -> None:
        """The watcher, while it looks."""
        self._wait_and_kill(lambda: self._engines("watch"))

    def controller(self) -> None:
        """The controller of the training job's first node."""
        self._wait_and_kill(lambda: self._of_job(lambda report: [report.controller.pid]))

    def rank(self, number: int) -> None:
        """A rank of the training job."""
        self._wait_and_kill(lambda: self._of_job(lambda report: [report.ranks[number].pid] if report.ranks else []))

    def node(self) -> None:
        """The node that the training job runs on, with all that runs there; it comes back when SLURM has missed it."""
        job = wait_for(training_jobs)[0]
        (name,) = slurm("squeue", "--noheader", "--jobs", job, "--format=%N").split()
        daemon = int((self.slurm / "run" / f"{name}.pid").read_text())
        steps = [step for step in psutil.process_iter() if step.name() == "slurmstepd" and _is_of(step, job)]
        victims = [psutil.Process(daemon), *steps]
        below = [child for step in steps for child in step.children(recursive=True)]
        _kill([*victims, *below])
        wait_for(lambda: _is_down(name))
        subprocess.run([ROOT / "infra" / "slurm" / "up", self.slurm], check=True, capture_output=True, timeout=300)

    def at_sbatch(self, point: str) -> None:
        """The training's next sbatch kills the flow that calls it, 'before' there is a job, or 'between' that and its
        number."""
        self.told.write_text(point)
        wait_for(lambda: not self.told.exists())

    def step(self) -> int:
        """The training's last step so far; 0 before the first."""
        files = list(self.run.workdir.glob("scratch/train-*/metrics.jsonl"))
        files += list(self.run.workdir.glob("train-*/metrics.jsonl"))
        rows = [row for path in files if (row := last_step(path))]
        return max((int(row["step"]) for row in rows), default=0)

    def goes_on(self, since: int) -> bool:
        """Whether steps were done since that one, and all that serve the chain run."""
        state = self.state()
        if state == "COMPLETED":
            return True
        assert state not in ("FAILED", "CANCELLED"), self.prefect.runs(self.run.path)
        return bool(self.step() > since and self._engines("llemma-pretrain") and self._engines("train"))

    def state(self) -> str:
        """The chain's; empty while the server does not answer, or before there is one."""
        try:
            return str(self.prefect.runs(self.run.path)["llemma-pretrain"]["type"])
        except (httpx.HTTPError, KeyError):
            return ""

    def _engines(self, flow: str) -> list[psutil.Process]:
        """Of the flow's newest run; of the watcher any; none while the server does not answer."""
        try:
            runs = self.prefect.find("flow_runs", flows={"name": {"any_": [flow]}})
        except httpx.HTTPError:
            return []
        if flow != "watch":
            runs = [run for run in runs if run["parameters"].get("config") == str(self.run.path)][-1:]
        return flow_processes(self.prefect.folder / "home", {run["id"] for run in runs})

    def _of_job(self, pids: Callable[[ControllerReport], list[int]]) -> list[psutil.Process]:
        reports = [ControllerReport.read(attempt) for attempt in self.run.attempts("train")[-1:]]
        return _processes([pid for report in reports if report for pid in pids(report)])

    def _wait_and_kill(self, found: Callable[[], list[psutil.Process]]) -> None:
        _kill(wait_for(found))


def _is_down(node: str) -> bool:
    """Whether SLURM has missed the node, which it may also have drained by then."""
    shown = slurm("scontrol", "--oneliner", "show", "node", node)
    return re.search(r"\bState=\S*(DOWN|NOT_RESPONDING)", shown) is not None


def training_jobs() -> list[str]:
    """SLURM's numbers of the trainings that wait, start or run."""
    rows = slurm("squeue", "--noheader", "--states=PENDING,CONFIGURING,RUNNING", "--format=%i %j").splitlines()
    return [number for number, name in map(str.split, rows) if name.startswith("llemma-train")]


def slurm(*command: str) -> str:
    """What a command of SLURM's says."""
    answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return answer.stdout


def _kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        try:
            process.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:  # its parent's end was its own
            continue
    _, alive = psutil.wait_procs(processes, timeout=60)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


def _processes(pids: list[int]) -> list[psutil.Process]:
    return [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]


def _is_of(step: psutil.Process, job: str) -> bool:
    return any(f"[{job}." in word for word in step.cmdline())
