"""Jobs on a real SLURM: what it says of their ends arrives in words, and none is lost or submitted twice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import cloudpickle
import pytest

from neox_core.config import LaunchConfig
from neox_core.errors import LaunchError
from tasks.jobs.job import Job
from tasks.jobs.launch import find_jobs, submit_or_attach
from tasks.jobs.registry import choose_executor
from tasks.jobs.status import Cause
from tests import waiting
from tests.paths import ROOT

sys.path.insert(0, str(Path(__file__).parents[1]))
import rank_functions

pytestmark = [pytest.mark.slurm, pytest.mark.usefixtures("slurm")]

KEY = "0123456789abcdef" * 4
LATE = {"signal": "USR2@1"}
"""submitit has the end announced 90 s before, which is more than these jobs have."""

wait_for = partial(waiting.wait_for, seconds=400.0, pause=0.2)


@pytest.fixture(autouse=True)
def _jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Rank functions travel by value, and no job outlives its test."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    cloudpickle.register_pickle_by_value(rank_functions)
    yield
    cloudpickle.unregister_pickle_by_value(rank_functions)
    for job in find_jobs(tmp_path, ""):
        job.cancel()


def submit(
    folder: Path,
    function: Callable[..., Any],
    *args: Any,
    nodes: int = 1,
    ranks: int = 1,
    key: str = KEY,
    **launch: Any,
) -> Job:
    config = LaunchConfig(**{"device": "cpu", "time_limit_minutes": 60, **launch})
    return submit_or_attach(config, folder, "test", key, function, args, nodes, ranks)


def started(folder: Path, ranks: int = 1) -> Callable[[], bool]:
    return lambda: all((folder / f"pid-{rank}").exists() for rank in range(ranks))


def test_ranks_meet_on_two_nodes(tmp_path: Path) -> None:
    assert choose_executor("auto") == "slurm"
    results = submit(tmp_path, rank_functions.sum_of_ranks, 10, nodes=2, ranks=1).results()
    assert [(result["sum"], result["RANK"], result["LOCAL_RANK"]) for result in results] == [(30.0, 0, 0), (30.0, 1, 0)]
    seen = submit(tmp_path, rank_functions.describe, nodes=2, ranks=2, device="cuda", key="f" * 64).results()
    assert seen == [("0", "node1", "0,1"), ("1", "node1", "0,1"), ("2", "node2", "0,1"), ("3", "node2", "0,1")]


def test_a_controller_that_does_not_answer_is_none(
    slurm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """sbatch is on the PATH all the same."""
    configuration = (slurm / "etc" / "slurm.conf").read_text()
    (tmp_path / "slurm.conf").write_text(configuration.replace("SlurmctldPort=", "SlurmctldPort=1 #"))
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm.conf"))
    assert choose_executor("auto") == "local"


SUBMITTER = """
import os, sys
from pathlib import Path
import cloudpickle
sys.path.insert(0, {tests!r})
import rank_functions
from neox_core.config import LaunchConfig
from tasks.jobs import launch
cloudpickle.register_pickle_by_value(rank_functions)
{before}
config = LaunchConfig(device="cpu", time_limit_minutes=60)
folder = Path({folder!r})
args = (str(folder), str(folder / "go"))
launch.submit_or_attach(config, folder, "test", {key!r}, rank_functions.count_starts, args, 1, 2)
os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize(
    ("before", "attempts"),
    [
        ("", 1),
        ("launch.JobRecord.with_ids = lambda *_: os.kill(os.getpid(), 9)", 1),
        # Between sbatch's answer and the laying down of the work: that job is of no use.
        ("from submitit.slurm.slurm import SlurmJob; SlurmJob.__init__ = lambda *_, **__: os.kill(os.getpid(), 9)", 2),
    ],
    ids=["noted", "not noted", "without work"],
)
def test_a_killed_submitters_job_is_found(tmp_path: Path, before: str, attempts: int) -> None:
    code = SUBMITTER.format(tests=str(Path(__file__).parents[1]), folder=str(tmp_path), key=KEY, before=before)
    submitter = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert submitter.returncode == -signal.SIGKILL, submitter.stderr
    job = submit(tmp_path, rank_functions.count_starts, str(tmp_path), str(tmp_path / "go"), ranks=2)
    (tmp_path / "go").touch()
    assert job.results() == [0, 1]
    assert len(list(tmp_path.glob("start-*"))) == 2
    assert len(list((tmp_path / KEY).glob("attempt-*"))) == attempts


def test_the_time_limit(tmp_path: Path) -> None:
    job = submit(tmp_path, rank_functions.ignore_preemption, str(tmp_path), time_limit_minutes=1, slurm_parameters=LATE)
    with pytest.raises(LaunchError, match=r"failed: its time limit is over: run again .*\(SLURM: TIMEOUT\)"):
        job.results()
    assert job.status().cause is Cause.TIMEOUT


def test_scancel(tmp_path: Path) -> None:
    job = submit(tmp_path, rank_functions.sleep_for_ever, str(tmp_path))
    wait_for(started(tmp_path))
    subprocess.run(["scancel", job.job_id], check=True)
    with pytest.raises(LaunchError, match=r"was cancelled: run again to go on .*\(SLURM: CANCELLED by 0"):
        job.results()
    again = submit(tmp_path, rank_functions.sleep_for_ever, str(tmp_path))
    assert again.job_id != job.job_id
    again.cancel()
    wait_for(again.done)
    assert again.state() == "cancelled"


def test_out_of_memory(tmp_path: Path) -> None:
    job = submit(tmp_path, rank_functions.use_memory, 900, slurm_parameters={"mem": "400M"})
    with pytest.raises(LaunchError, match="failed: it used more main memory than it may: ask for more"):
        job.results()
    assert job.status().cause is Cause.OUT_OF_MEMORY


def test_a_killed_rank_comes_before_those_that_noticed(tmp_path: Path) -> None:
    job = submit(tmp_path, rank_functions.rank_1_is_killed, str(tmp_path), nodes=2, ranks=1)
    with pytest.raises(LaunchError, match=r"failed, rank 1 first: killed without a Python error; last words: .*memory"):
        job.results()


def preempt(folder: Path) -> Job:
    """A job that needs all nodes, at a higher priority."""
    whole = {"exclusive": True}
    return submit(folder, rank_functions.describe, nodes=4, key="f" * 64, partition="high", slurm_parameters=whole)


def test_preemption_that_cancels(tmp_path: Path) -> None:
    job = submit(tmp_path, rank_functions.ignore_preemption, str(tmp_path), partition="cancel")
    wait_for(started(tmp_path))
    assert len(preempt(tmp_path).results()) == 4
    with pytest.raises(LaunchError, match=r"failed: a job of higher priority took its place: .*\(SLURM: PREEMPTED"):
        job.results()


def test_a_preempted_job_goes_on_by_itself(tmp_path: Path) -> None:
    args = (str(tmp_path), str(tmp_path / "go"))
    job = submit(tmp_path, rank_functions.count_starts, *args, partition="requeue")
    wait_for(lambda: list(tmp_path.glob("start-*")))
    assert len(preempt(tmp_path).results()) == 4
    wait_for(lambda: len(list(tmp_path.glob("start-*"))) == 2)
    (tmp_path / "go").touch()
    assert job.results() == [0]


def test_a_node_that_fails(tmp_path: Path, slurm: Path) -> None:
    parameters = {"nodelist": "node4", "no-requeue": True}
    job = submit(tmp_path, rank_functions.sleep_for_ever, str(tmp_path), slurm_parameters=parameters)
    wait_for(started(tmp_path))
    try:
        os.kill(int((slurm / "run" / "node4.pid").read_text()), signal.SIGKILL)
        with pytest.raises(LaunchError, match=r"failed: a node failed: run again"):
            job.results()
        assert job.status().cause is Cause.NODE_FAIL
    finally:
        subprocess.run([ROOT / "infra" / "slurm" / "up", slurm], check=True, capture_output=True)
        os.kill(int((tmp_path / "pid-0").read_text()), signal.SIGKILL)  # nobody is left to end it
