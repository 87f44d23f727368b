"""Server, worker, deployments and the watcher's schedule: start what is not running, and end it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil  # type: ignore[import-untyped]

from infra.ports import taken
from infra.prefect.keeper import STOP_SECONDS
from infra.prefect.services import (
    DEPLOY,
    ROOT,
    SERVER,
    SERVICES,
    WORKER,
    ServiceRecord,
    answers,
    forget,
    log_file,
    page_url,
)
from infra.processes import end_processes
from neox_core.errors import LlemmaError

_START_SECONDS = 600.0
"""On a busy machine it takes minutes; a keeper that has ended is not waited for."""
_DEFAULT_PORT = 4200

Say = Callable[[str, str], None]
"""Told what was done about which service."""


def up(folder: Path, port: int | None, database: str | None, say: Say) -> None:
    """Start what is not running yet, and deploy all flows anew.

    Args:
        folder: for data, logs and process ids.
        port: the server's; None: that of the running one, else PREFECT_SERVER_API_PORT, else 4200.
        database: postgresql+asyncpg://USER:PASSWORD@HOST/DATABASE; None: as the environment says, else SQLite.

    Raises:
        LlemmaError: another program has the port, the server runs on another one, or something does not start.
    """
    with _alone(folder):
        running = ServiceRecord.read(folder, SERVER)
        if running and running.is_up and port not in (None, running.port):
            raise LlemmaError(f"the server runs on port {running.port}, not {port}: `llemma down` first, then up again")
        if port is None:
            port = running.port if running else int(os.environ.get("PREFECT_SERVER_API_PORT", _DEFAULT_PORT))
        environment = _environment(folder, port, database)
        _start(SERVER, folder, port, environment, say, lambda: answers(f"{page_url(port)}/api"))
        for command in DEPLOY:
            _run(command, environment)
        say("deployments", "all flows of prefect.yaml, and the watcher's schedule")
        _start(WORKER, folder, port, environment, say, lambda: True)
        say("pages", page_url(port))


def down(folder: Path, say: Say) -> None:
    """End worker and server that were started in this folder, and nothing else; data and logs stay."""
    with _alone(folder):
        for name in reversed(SERVICES):
            record = ServiceRecord.read(folder, name)
            if record and any(process.is_alive() for process in record.processes):
                end_processes([record.keeper], 2 * STOP_SECONDS)
                _end_service(folder, name)  # it has ended already, unless its keeper was killed
                say(name, "ended")
            else:
                say(name, "was not running")
            forget(folder, name)


def _start(
    name: str, folder: Path, port: int, environment: dict[str, str], say: Say, is_ready: Callable[[], bool]
) -> None:
    record = ServiceRecord.read(folder, name)
    if record and record.is_up:
        say(name, f"is up already (process {record.keeper.pid}, log {log_file(folder, name)})")
        return
    _end_service(folder, name)  # which has lost its keeper
    if name == SERVER:
        _check_free(port)
    with log_file(folder, name).open("ab") as log:
        keeper = subprocess.Popen(
            [sys.executable, "-m", "infra.prefect.keeper", name, str(folder), str(port)],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # which Ctrl-C in the terminal does not reach
        )
    _await(name, folder, keeper, is_ready)
    say(name, f"started (process {keeper.pid}, log {log_file(folder, name)})")


def _await(name: str, folder: Path, keeper: subprocess.Popen[bytes], is_ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline and keeper.poll() is None:
        record = ServiceRecord.read(folder, name)
        if record and record.keeper.pid == keeper.pid and record.service and is_ready():
            return
        time.sleep(0.2)
    raise LlemmaError(f"the {name} does not start: see {log_file(folder, name)}; `llemma down`, then up again")


def _end_service(folder: Path, name: str) -> None:
    record = ServiceRecord.read(folder, name)
    if record and record.service:
        end_processes([record.service], STOP_SECONDS)


def _run(command: tuple[str, ...], environment: dict[str, str]) -> None:
    answer = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if answer.returncode:
        last = " ".join((answer.stderr.strip() or answer.stdout.strip()).splitlines()[-3:])
        raise LlemmaError(f"`prefect {' '.join(command[1:])}` ended with exit code {answer.returncode}: {last}")


def _environment(folder: Path, port: int, database: str | None) -> dict[str, str]:
    """For infra/prefect/env.sh, which sets the rest. The database's password is nowhere but in there."""
    outside = {name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"}
    own = {"PREFECT_HOME": str(folder), "PREFECT_SERVER_API_PORT": str(port)}
    return outside | own | ({"PREFECT_API_DATABASE_CONNECTION_URL": database} if database else {})


def _check_free(port: int) -> None:
    if reason := taken(port, os.environ.get("PREFECT_SERVER_API_HOST", "127.0.0.1")):
        raise LlemmaError(f"port {port} is taken by {_listener(port)} ({reason}): end that, or give another --port")


def _listener(port: int) -> str:
    for connection in psutil.net_connections("tcp"):
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port and connection.pid:
            with contextlib.suppress(psutil.Error):  # it ends just now
                return f"process {connection.pid} ({' '.join(psutil.Process(connection.pid).cmdline())[:80]})"
    return "another program"


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Two that start or end services at once wait for each other."""
    (folder / "services").mkdir(parents=True, exist_ok=True)
    with (folder / "services" / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
