"""What ends is started again, until it is told to stop."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra.prefect.services import ServiceRecord, running_page
from infra.processes import ProcessRecord
from tests.waiting import wait_for

KEEP = """
import sys
from pathlib import Path
from infra.prefect.keeper import keep
keep("server", Path(sys.argv[1]), 4999, [sys.executable, "-c", "import time; time.sleep(600)"], 0.01)
"""


@pytest.fixture
def keeper(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    (tmp_path / "services").mkdir()
    process = subprocess.Popen([sys.executable, "-c", KEEP, tmp_path])
    yield process
    process.kill()
    process.wait()
    record = ServiceRecord.read(tmp_path, "server")
    if record and record.service:
        record.service.send(signal.SIGKILL)


def started(folder: Path, *, after: ProcessRecord | None = None) -> ProcessRecord:
    def service() -> ProcessRecord | None:
        record = ServiceRecord.read(folder, "server")
        return record.service if record and record.service != after else None

    found = wait_for(service, seconds=300.0)
    assert found
    assert found.is_alive()
    return found


def test_a_killed_service_is_started_again_and_ends_with_its_keeper(
    tmp_path: Path, keeper: subprocess.Popen[bytes]
) -> None:
    first = started(tmp_path)
    assert running_page(tmp_path) == "http://127.0.0.1:4999"
    first.send(signal.SIGKILL)
    second = started(tmp_path, after=first)
    assert keeper.poll() is None
    keeper.terminate()
    assert keeper.wait(300) == 0
    assert not second.is_alive()
    assert running_page(tmp_path) is None
