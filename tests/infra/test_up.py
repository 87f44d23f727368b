"""`llemma up` and `llemma down` without a server; with one, see test_prefect_deployments."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from infra.prefect.services import ServiceRecord, log_file
from infra.prefect.up import down, up
from infra.processes import ProcessRecord
from neox_core.errors import LlemmaError

SLEEP = [sys.executable, "-c", "import time; time.sleep(600)"]


def nobody(what: str, text: str) -> None:
    raise AssertionError(f"nothing was to be done: {what}: {text}")


def test_a_port_that_another_program_has_is_refused_by_its_name(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(LlemmaError, match=rf"port {port} is taken by process {os.getpid()} \(.*another --port"):
            up(tmp_path, port, None, nobody)
    assert not log_file(tmp_path, "server").exists()


def test_another_port_than_the_running_servers_is_refused(tmp_path: Path) -> None:
    (tmp_path / "services").mkdir()
    ServiceRecord(ProcessRecord.of(os.getpid()), None, 4300).write(tmp_path, "server")
    with pytest.raises(LlemmaError, match="the server runs on port 4300, not 4301: `llemma down` first"):
        up(tmp_path, 4301, None, nobody)


def test_down_ends_what_was_noted_down_and_nothing_else(tmp_path: Path) -> None:
    said: list[tuple[str, str]] = []
    with (
        subprocess.Popen(SLEEP) as worker,
        subprocess.Popen(SLEEP) as reused,
    ):
        try:
            (tmp_path / "services").mkdir()
            gone = ProcessRecord(reused.pid, ProcessRecord.of(reused.pid).started - 3600)
            # A worker that has lost its keeper, whose pid is another program's by now; and a server that is gone.
            ServiceRecord(gone, ProcessRecord.of(worker.pid), 4300).write(tmp_path, "worker")
            ServiceRecord(gone, None, 4300).write(tmp_path, "server")
            log_file(tmp_path, "worker").touch()
            down(tmp_path, lambda what, text: said.append((what, text)))
            assert said == [("worker", "ended"), ("server", "was not running")]
            assert worker.poll() is not None
            assert reused.poll() is None
        finally:
            worker.kill()
            reused.kill()
    assert sorted(path.name for path in (tmp_path / "services").iterdir()) == ["lock", "worker.log"]
