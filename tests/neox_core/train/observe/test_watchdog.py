"""A hang that Python itself takes part in; hangs of several ranks are in tests/tasks/test_launch.py."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from neox_core.train.observe.watchdog import Watchdog

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
