"""A hang that Python itself takes part in; hangs of several ranks are in tests/tasks/jobs/test_launch.py."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch.distributed as dist

from neox_core.errors import SUPERSEDED_EXIT_CODE
from neox_core.train.observe.watchdog import _SILENT, _WAITS, Watchdog, _suspects

PATIENCE = 300.0
"""Seconds after which something hangs."""
LOCKED = """
import ctypes, faulthandler, logging, sys, time
import torch.distributed as dist
from neox_core.train.observe.watchdog import Watchdog

logging.basicConfig()
armed, arm = [], faulthandler.dump_traceback_later
faulthandler.dump_traceback_later = lambda seconds, **others: (arm(seconds, **others), armed.append(seconds))
dist.init_process_group("gloo", store=dist.FileStore(sys.argv[1], 1), rank=0, world_size=1)
with Watchdog(1.0, 0, 1) as watchdog:
    watchdog.beat("step 1")
    watchdog.beat("step 2")
    while armed[-1:] != [1.0]:  # until the watchdog has looked at this step, however late
        time.sleep(0.01)
        watchdog.beat()
    ctypes.PyDLL(None).sleep(3600)  # holds Python's lock
"""


LOGGING_LOCKED = LOCKED.replace(
    "ctypes.PyDLL(None).sleep(3600)  # holds Python's lock",
    "logging.getLogger().handlers[0].acquire(); time.sleep(3600)",
)


@pytest.mark.parametrize("code", [LOCKED, LOGGING_LOCKED], ids=["Python's", "logging's"])
def test_a_thread_that_holds_a_lock_is_ended_too(tmp_path: Path, code: str) -> None:
    command = [sys.executable, "-c", code, str(tmp_path / "world")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert ended.returncode == 1
    assert "Timeout" in ended.stderr
    assert 'File "<string>"' in ended.stderr


SUPERSEDED = LOCKED.replace(
    "ctypes.PyDLL(None).sleep(3600)  # holds Python's lock",
    "watchdog.end_soon(0.5, 'another job is at work'); time.sleep(3600)",
).replace("1.0", "600.0")


def test_a_long_step_does_not_keep_a_job_that_must_end(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SUPERSEDED, str(tmp_path / "world")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert ended.returncode == SUPERSEDED_EXIT_CODE
    assert "another job is at work; no step has ended within 0 s: ending at once" in ended.stderr


def test_what_a_kind_of_work_has_taken_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long the first took; a large model's step may take longer than the timeout."""
    clock = [0.0]
    monkeypatch.setattr("neox_core.train.observe.watchdog.time.monotonic", lambda: clock[0])
    watchdog = Watchdog(60.0, 0, 1)
    allowed = []
    for place, seconds in (("step 1", 900), ("step 2", 50), ("step 3", 10), ("save 3", 7), ("step 4", 1)):
        watchdog.beat(place)
        allowed.append(watchdog._allowance)
        clock[0] += seconds
    assert allowed == [1800.0, 60.0, 150.0, 1800.0, 150.0]


@pytest.mark.parametrize(
    ("places", "suspects"),
    [
        ({f"step 7, {_WAITS}": [0, 2], "step 7, in read (bins.py:9)": [1]}, [1]),
        ({"step 7, in read (bins.py:9)": [0, 2], _SILENT: [1]}, [1]),
        ({f"step 7, {_WAITS}": [0, 1]}, []),
    ],
)
def test_who_is_waited_for(places: dict[str, list[int]], suspects: list[int]) -> None:
    assert _suspects(places) == suspects


def test_ending_well_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that goes on with the steps: on a busy machine, a thread may be late by more than the timeout."""
    clock, looked, timer, ended = [0.0], threading.Semaphore(0), [""], list[float]()

    def arm(seconds: float, **others: object) -> None:
        timer.append("armed")
        looked.release()

    name = "neox_core.train.observe.watchdog"
    monkeypatch.setattr(f"{name}.time.monotonic", lambda: clock[0])
    monkeypatch.setattr(f"{name}.faulthandler.dump_traceback_later", arm)
    monkeypatch.setattr(f"{name}.faulthandler.cancel_dump_traceback_later", lambda: timer.append("cancelled"))
    monkeypatch.setattr(Watchdog, "_end", lambda watchdog, seconds: ended.append(seconds))
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "world"), 1), rank=0, world_size=1)
    try:
        with Watchdog(0.2, 0, 1) as watchdog:
            for step in range(1, 20):
                watchdog.beat(f"step {step}")
                clock[0] += 0.03
                for _ in range(2):  # the second look has begun after the beat
                    assert looked.acquire(timeout=PATIENCE)
    finally:
        dist.destroy_process_group()
    assert ended == []
    assert timer[-1] == "cancelled"
    assert not [thread for thread in threading.enumerate() if thread.name == "watchdog"]
