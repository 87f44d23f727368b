from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from infra.processes import ProcessRecord, end_processes, wait_for_end


def start(code: str) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    process.stdout.readline()  # it is ready
    return process


def test_a_process_is_known_by_pid_and_start_time() -> None:
    process = start("print('ready', flush=True); import time; time.sleep(600)")
    record = ProcessRecord.of(process.pid)
    impostor = ProcessRecord(process.pid, record.started - 60)
    assert record.is_alive()
    assert not impostor.is_alive()
    impostor.send(signal.SIGKILL)
    impostor.reap()
    assert not wait_for_end([record], 0.1)
    end_processes([record, impostor], 5)
    assert not record.is_alive()
    with pytest.raises(ProcessLookupError):
        ProcessRecord.of(process.pid)


def test_a_process_that_ignores_sigterm_is_killed() -> None:
    process = start(
        "import signal, time; signal.signal(15, signal.SIG_IGN); print('ready', flush=True); time.sleep(600)"
    )
    record = ProcessRecord.of(process.pid)
    end_processes([record], 0.2)
    assert not record.is_alive()


def test_what_is_killed_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also without any grace, and where the kernel takes its time."""
    process = start("print('ready', flush=True); import time; time.sleep(600)")
    is_alive, looks = ProcessRecord.is_alive, iter(range(10))
    monkeypatch.setattr(ProcessRecord, "is_alive", lambda record: next(looks, None) is not None or is_alive(record))
    end_processes([ProcessRecord.of(process.pid)], 0.0)
    assert next(looks, None) is None
    assert process.poll() is not None


def test_an_ended_child_that_nobody_waited_for_is_not_alive() -> None:
    process = start("print('ready', flush=True)")
    record = ProcessRecord.of(process.pid)
    assert wait_for_end([record], 300)
    assert not record.is_alive()
