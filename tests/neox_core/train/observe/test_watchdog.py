"""A hang that Python itself takes part in; hangs of several ranks are in tests/tasks/jobs/test_launch.py."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from neox_core.errors import SUPERSEDED_EXIT_CODE
from neox_core.train.observe.watchdog import _SILENT, _WAITS, Watchdog, _suspects

LOCKED = """
import ctypes, logging, sys
import torch.distributed as dist
from neox_core.train.observe.watchdog import Watchdog

logging.basicConfig()
dist.init_process_group("gloo", store=dist.FileStore(sys.argv[1], 1), rank=0, world_size=1)
with Watchdog(1.0, 0, 1) as watchdog:
    watchdog.beat("step 1")
    watchdog.beat("step 2")
    import time; time.sleep(0.2)  # the watchdog has looked
    ctypes.PyDLL(None).sleep(3600)  # holds Python's lock
"""


LOGGING_LOCKED = LOCKED.replace(
    "ctypes.PyDLL(None).sleep(3600)  # holds Python's lock",
    "logging.getLogger().handlers[0].acquire(); time.sleep(3600)",
)


@pytest.mark.parametrize("code", [LOCKED, LOGGING_LOCKED], ids=["Python's", "logging's"])
def test_a_thread_that_holds_a_lock_is_ended_too(tmp_path: Path, code: str) -> None:
    command = [sys.executable, "-c", code, str(tmp_path / "world")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 1
    assert "Timeout" in ended.stderr
    assert 'File "<string>"' in ended.stderr


SUPERSEDED = LOCKED.replace(
    "ctypes.PyDLL(None).sleep(3600)  # holds Python's lock",
    "watchdog.end_soon(0.5, 'another job is at work'); time.sleep(0.9); time.sleep(3600)",
).replace("Watchdog(1.0", "Watchdog(60.0")


def test_a_long_step_does_not_keep_a_job_that_must_end(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SUPERSEDED, str(tmp_path / "world")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
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
    monkeypatch.setattr(Watchdog, "_end", lambda *args: pytest.fail("ended a job that makes progress"))
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "world"), 1), rank=0, world_size=1)
    try:
        with Watchdog(0.2, 0, 1) as watchdog:
            for step in range(1, 20):
                watchdog.beat(f"step {step}")
                time.sleep(0.03)
    finally:
        dist.destroy_process_group()
    assert not [thread for thread in threading.enumerate() if thread.name == "watchdog"]
