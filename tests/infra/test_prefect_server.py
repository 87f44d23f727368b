from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import pytest

from infra.prefect_server import end_orphans, own_prefect_server
from infra.processes import ProcessRecord
from neox_core.errors import LlemmaError

SERVER = [sys.executable, "-c", "import time; time.sleep(600)", "prefect.server.api.server:create_app"]
OTHER = SERVER[:3]


@contextmanager
def started(command: list[str], home: Path, owner: ProcessRecord | None) -> Iterator[subprocess.Popen[bytes]]:
    mark = {"LLEMMA_PREFECT_OWNER": json.dumps(asdict(owner))} if owner else {}
    process = subprocess.Popen(command, env=os.environ | {"PREFECT_HOME": str(home)} | mark)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def test_only_servers_of_killed_runs_in_this_folder_are_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "prefect"
    monkeypatch.setenv("PREFECT_HOME", str(home))
    monkeypatch.setenv("LLEMMA_PREFECT_OWNER", "")  # restored afterwards
    alive = ProcessRecord.of(os.getpid())
    dead = ProcessRecord(alive.pid, alive.started - 3600)
    with (
        started(SERVER, home, dead) as orphan,
        started(SERVER, home, alive) as used,
        started(SERVER, home, None) as not_ours,
        started(SERVER, tmp_path / "other", dead) as elsewhere,
        started(OTHER, home, dead) as no_server,
    ):
        end_orphans()
        assert orphan.poll() is not None
        assert [process.poll() for process in (used, not_ours, elsewhere, no_server)] == [None] * 4
    assert json.loads(os.environ["LLEMMA_PREFECT_OWNER"]) == asdict(alive)


def test_the_folder_of_the_log_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "not" / "there"
    monkeypatch.setenv("PREFECT_HOME", str(home))
    monkeypatch.setenv("LLEMMA_PREFECT_OWNER", "")  # restored afterwards
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.setattr(sys, "executable", shutil.which("false"))  # a server that ends at once
    with (
        pytest.raises(LlemmaError, match=f"Prefect's server does not start: see {home}/server.log"),
        own_prefect_server(),
    ):
        pass
    assert (home / "server.log").is_file()
