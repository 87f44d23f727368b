"""Ranks that die are started again in their job, all of them and on all nodes, and not for ever."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import cloudpickle
import psutil
import pytest

from neox_core.errors import GO_ON_EXIT_CODE
from tasks.jobs.node.plan import NodePlan, Restarts
from tasks.jobs.node.report import ControllerReport
from tasks.jobs.rank_record import read_failure, read_result
from tests import waiting
from tests.tasks.jobs.node.nodes import job, rank_processes

sys.path.insert(0, str(Path(__file__).parents[1]))
import rank_functions

WAIT = 500
"""Seconds after which something hangs."""

wait_for = partial(waiting.wait_for, seconds=WAIT)


@pytest.fixture(autouse=True)
def _by_value() -> Iterator[None]:
    cloudpickle.register_pickle_by_value(rank_functions)
    yield
    cloudpickle.unregister_pickle_by_value(rank_functions)


def starts(folder: Path, rank: int) -> int:
    return len(list(folder.glob(f"start-{rank}-*")))


def restarts(folder: Path, limit: int = 2) -> Restarts:
    return Restarts(limit, folder / "saved")


def test_a_killed_rank_is_named_and_all_are_started_again(tmp_path: Path) -> None:
    args = (str(tmp_path), 1)
    with job(tmp_path / "job", rank_functions.fall, *args, ranks=2, restarts=restarts(tmp_path)) as (controller,):
        assert controller.wait(WAIT) == 0
    assert [read_result(tmp_path / "job", 0, rank) for rank in (0, 1)] == [("0", "2"), ("1", "2")]
    assert [starts(tmp_path, rank) for rank in (0, 1)] == [2, 2]
    log = (tmp_path / "job" / "node-0.log").read_text()
    assert "rank 1 was killed by signal 9 without a Python error" in log
    assert "starting all ranks again (1 of 2 times without a new checkpoint)" in log


@pytest.mark.parametrize(("saves", "lives"), [(0, 3), (2, 4)])
def test_a_crash_loop_ends_with_all_reasons(tmp_path: Path, saves: int, lives: int) -> None:
    """A life that saved something begins to count anew."""
    args = (str(tmp_path), 9, saves)
    with job(tmp_path / "job", rank_functions.fall, *args, ranks=2, restarts=restarts(tmp_path)) as (controller,):
        assert controller.wait(WAIT) == 1
    assert starts(tmp_path, 1) == lives
    log = (tmp_path / "job" / "node-0.log").read_text()
    reasons = [line for line in log.splitlines() if "without a new checkpoint: rank 1 was killed" in line]
    assert [f"end {number} " in line for number, line in enumerate(reasons, start=1)] == [True] * 3
    report = ControllerReport.read(tmp_path / "job")
    assert report is not None
    assert len(report.restarts) == 3


def test_what_the_program_refuses_is_not_tried_again(tmp_path: Path) -> None:
    with job(tmp_path / "job", rank_functions.refuse, str(tmp_path), restarts=restarts(tmp_path)) as (controller,):
        assert controller.wait(WAIT) == 1
    assert starts(tmp_path, 0) == 1


def test_nodes_start_their_ranks_again_together(tmp_path: Path) -> None:
    function, again = rank_functions.meet_after_a_fall, restarts(tmp_path)
    with job(tmp_path / "job", function, str(tmp_path), nodes=2, restarts=again) as controllers:
        assert [controller.wait(WAIT) for controller in controllers] == [0, 0]
    assert [read_result(tmp_path / "job", 0, rank) for rank in (0, 1)] == [3.0, 3.0]
    assert "rank 0 ended with exit code 3" in (tmp_path / "job" / "node-0.log").read_text()


def test_nodes_end_together(tmp_path: Path) -> None:
    args = (str(tmp_path), 9)
    with job(tmp_path / "job", rank_functions.fall, *args, nodes=2, restarts=restarts(tmp_path, 1)) as controllers:
        assert [controller.wait(WAIT) for controller in controllers] == [1, 1]
    assert [starts(tmp_path, rank) for rank in (0, 1)] == [2, 2]


def test_a_stopped_rank_and_a_killed_controller_leave_nothing(tmp_path: Path) -> None:
    args = (str(tmp_path),)
    with job(tmp_path / "job", rank_functions.sleep_for_ever, *args, ranks=2, restarts=restarts(tmp_path)) as started:
        wait_for(lambda: len(list(tmp_path.glob("pid-*"))) == 2)
        ranks = rank_processes(tmp_path / "job", 1)
        os.kill(ranks[0].pid, signal.SIGSTOP)
        started[0].kill()
        wait_for(lambda: not any(rank.is_alive() for rank in ranks))


def test_the_only_rank_is_stopped_and_started_again(tmp_path: Path) -> None:
    with job(tmp_path / "job", rank_functions.freeze, str(tmp_path), restarts=restarts(tmp_path)) as (controller,):
        assert controller.wait(WAIT) == 0
    assert starts(tmp_path, 0) == 2
    assert "rank 0 had been stopped (SIGSTOP) for 3" in (tmp_path / "job" / "node-0.log").read_text()


def test_a_rank_that_has_failed_does_not_wait_for_its_threads(tmp_path: Path) -> None:
    with job(tmp_path / "job", rank_functions.linger, str(tmp_path), restarts=restarts(tmp_path, 0)) as (controller,):
        assert controller.wait(WAIT) == 1
    assert not psutil.pid_exists(int((tmp_path / "start-0-0").read_text()))
    failure = read_failure(tmp_path / "job", 0, 0)
    assert failure is not None
    assert failure.message == "ValueError: over"


def test_a_signal_is_passed_on_and_is_the_end(tmp_path: Path) -> None:
    args = (str(tmp_path),)
    with job(tmp_path / "job", rank_functions.stop_when_told, *args, restarts=restarts(tmp_path)) as (controller,):
        wait_for(lambda: list(tmp_path.glob("pid-*")))
        controller.send_signal(signal.SIGUSR2)  # before the rank listens
        assert controller.wait(WAIT) == GO_ON_EXIT_CODE
    assert starts(tmp_path, 0) == 1
    failure = read_failure(tmp_path / "job", 0, 0)
    assert failure is not None
    assert failure.message == "stopped, and all is saved"


def test_a_plan_survives_the_command_line(tmp_path: Path) -> None:
    for again in (None, Restarts(3, tmp_path / "saved")):
        plan = NodePlan(tmp_path, "7", 8, 1, 4, restarts=again, seconds=60.0)
        assert NodePlan.from_json(plan.to_json()) == plan
    assert plan.first_rank == 8
