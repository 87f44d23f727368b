"""The server of a run that has none: in a session of its own, which Ctrl-C in the terminal does not reach, so that the
run can still say there what became of it."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import psutil  # type: ignore[import-untyped]

from infra.ports import hold_port, port_of
from infra.prefect.services import answers
from infra.processes import ProcessRecord, end_processes
from neox_core.errors import LlemmaError

logger = logging.getLogger(__name__)

_OWNER = "LLEMMA_PREFECT_OWNER"
_HOME = "PREFECT_HOME"
_URL = "PREFECT_API_URL"
_PROGRAM = "prefect.server.api.server:create_app"
_GRACE_SECONDS = 3.0
_START_SECONDS = 600.0
"""On a busy machine it takes minutes; one that has ended is not waited for."""


@contextmanager
def own_prefect_server() -> Iterator[None]:
    """Run a server while the context lasts, with PREFECT_API_URL set; nothing, if that is set already.

    Raises:
        LlemmaError: the server does not start.
    """
    if os.environ.get(_URL):
        yield
        return
    end_orphans()
    held = hold_port()
    port = port_of(held)
    log = Path(os.environ[_HOME]) / "server.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "uvicorn", "--factory", _PROGRAM, "--host", "127.0.0.1", "--port", str(port)]
    patient = {"PREFECT_SERVER_DATABASE_TIMEOUT": "120"}  # as in infra/prefect/env.sh
    own = {
        "PREFECT_UI_ENABLED": "0",
        "PREFECT__SERVER_EPHEMERAL": "1",
        "PREFECT__SERVER_FINAL": "1",
    }
    with log.open("ab") as output:
        server = subprocess.Popen(
            [*command, "--log-level", "error", "--lifespan", "on"],
            env=patient | os.environ | own,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    record = ProcessRecord.of(server.pid)
    try:
        os.environ[_URL] = f"http://127.0.0.1:{port}/api"
        _await(server, log)
        yield
    finally:
        end_processes([record], _GRACE_SECONDS)
        held.close()
        del os.environ[_URL]


def end_orphans() -> None:
    """Mark the server that this process may start as its own; end those of killed runs with the same PREFECT_HOME.

    They would hold the database's file, and nobody else would ever end them.
    """
    orphans = list(_orphans(os.environ[_HOME]))
    if orphans:
        logger.info("ending %d Prefect servers that killed runs have left", len(orphans))
        end_processes(orphans, _GRACE_SECONDS)
    os.environ[_OWNER] = json.dumps(asdict(ProcessRecord.of(os.getpid())))


def _await(server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        if answers(os.environ[_URL]):
            return
        time.sleep(0.2)
    raise LlemmaError(f"Prefect's server does not start: see {log}, then run again")


def _orphans(home: str) -> Iterator[ProcessRecord]:
    for process in psutil.process_iter():
        try:
            environment = process.environ() if _PROGRAM in process.cmdline() else {}
            owner = environment.get(_OWNER)
            if owner and environment.get(_HOME) == home and not ProcessRecord(**json.loads(owner)).is_alive():
                yield ProcessRecord.of(process.pid)
        except (psutil.Error, ProcessLookupError):
            continue  # it has ended meanwhile, or is another user's
