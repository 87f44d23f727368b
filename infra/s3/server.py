"""One OpenStack Swift with S3 API on loopback: four server processes whose data and logs lie in one folder."""

from __future__ import annotations

import json
import logging
import os
import pwd
import secrets
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from http.client import HTTPException
from pathlib import Path

import jinja2
import psutil  # type: ignore[import-untyped]

from infra.ports import hold_port, port_of, taken
from infra.processes import ProcessRecord, end_processes
from neox_core.errors import StorageError
from neox_core.storage.atomic import write_atomically

logger = logging.getLogger(__name__)

REGION = "us-east-1"
_KINDS = ("proxy", "object", "container", "account")
_STATE_FILE = "server.json"
_START_TIMEOUT_SECONDS = 300.0
"""On a busy machine it takes a minute and more; one whose processes have ended is not waited for."""
_ANSWER_SECONDS = 30.0
_STOP_GRACE_SECONDS = 5.0
_PORT_GRACE_SECONDS = 20.0
"""The threads of a killed server may hold its port a moment longer than the process can be seen."""


@dataclass(frozen=True)
class S3Endpoint:
    """Where an S3 server answers, and the keys that it accepts."""

    url: str
    access_key: str
    secret_key: str


@dataclass(frozen=True)
class ServerState:
    """What the folder remembers of its server; ports and keys stay the same over restarts where they can."""

    ports: Mapping[str, int]
    access_key: str
    secret_key: str
    processes: tuple[ProcessRecord, ...] = ()

    @property
    def endpoint(self) -> S3Endpoint:
        """Where clients find it."""
        return S3Endpoint(f"http://127.0.0.1:{self.ports['proxy']}", self.access_key, self.secret_key)


def ensure_running(folder: Path) -> S3Endpoint:
    """Find the folder's running server or start it. The caller must hold the folder's lock.

    Raises:
        StorageError: Swift is not installed, the file system lacks what it needs, or it does not start.
    """
    state = _read_state(folder)
    # One that runs is waited for: it may be slow to answer, and others use it.
    if state and len(state.processes) == len(_KINDS) and _wait_until_healthy(state):
        return state.endpoint
    if state:
        end_processes(state.processes, _STOP_GRACE_SECONDS)
    _check_requirements(folder)
    for attempt in (1, 2):  # another program may take a port between our look and Swift's
        state = _prepare(folder, state)
        state = _start(folder, state)
        if _wait_until_healthy(state):
            logger.info("S3 server on %s started, data in %s", state.endpoint.url, folder)
            return state.endpoint
        end_processes(state.processes, _STOP_GRACE_SECONDS)
        logger.warning("S3 server in %s did not start (attempt %d of 2)", folder, attempt)
    raise StorageError(f"the embedded S3 server did not start: see the logs in {folder / 'log'}")


def stop(folder: Path) -> None:
    """Stop the folder's server, if it runs; the data stay. The caller must hold the folder's lock."""
    state = _read_state(folder)
    if state:
        end_processes(state.processes, _STOP_GRACE_SECONDS)
        _write_state(folder, replace(state, processes=()))
        logger.info("S3 server on %s stopped", state.endpoint.url)


def _read_state(folder: Path) -> ServerState | None:
    try:
        content = json.loads((folder / _STATE_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    processes = tuple(ProcessRecord(**record) for record in content.pop("processes"))
    return ServerState(**content, processes=processes)


def _write_state(folder: Path, state: ServerState) -> None:
    write_atomically(folder / _STATE_FILE, json.dumps(asdict(state), indent=1))


def _check_requirements(folder: Path) -> None:
    if not (_programs() / "swift-proxy-server").exists():
        raise StorageError(
            "the embedded S3 server needs OpenStack Swift: "
            'pip install "llemma-pretrain[s3-server]", or set storage.endpoint_url to a server of yours'
        )
    probe = folder / ".xattr-probe"
    probe.touch()
    try:
        os.setxattr(probe, "user.swift.probe", b"1")
    except OSError as error:
        raise StorageError(
            f"the file system of {folder} has no extended attributes ({error.strerror}), which the embedded S3 server "
            "needs: put workdir on a local disk, or set storage.endpoint_url to a server of yours"
        ) from None
    finally:
        probe.unlink()


def _programs() -> Path:
    return Path(sys.prefix) / "bin"


def _prepare(folder: Path, state: ServerState | None) -> ServerState:
    """Choose ports that are free (the old ones if possible) and write rings and configuration for them."""
    if state is None:
        state = ServerState(_free_ports(), "llemma:llemma", secrets.token_hex(20))
    elif not all(_becomes_free(port) for port in state.ports.values()):
        state = replace(state, ports=_free_ports())
    for name in ("etc", "log", "recon", "data/d1"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        undefined=jinja2.StrictUndefined,
    )
    values = {"folder": folder, "user": _user_name(), "region": REGION, **asdict(state)}
    write_atomically(folder / "etc" / "swift.conf", templates.get_template("swift.conf.j2").render())
    for kind in _KINDS:
        template = templates.get_template("proxy.conf.j2" if kind == "proxy" else "backend.conf.j2")
        write_atomically(
            folder / "etc" / f"{kind}.conf", template.render(values, kind=kind, port=state.ports[kind]) + "\n"
        )
    _write_rings(folder, state)
    return state


def _user_name() -> str:
    """This user's name.

    Raises:
        StorageError: the user id has none, which Swift cannot do without.
    """
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        raise StorageError(
            f"user id {os.getuid()} has no name in /etc/passwd, which the embedded S3 server needs: add an "
            "entry, or set storage.endpoint_url to a server of yours"
        ) from None


def _write_rings(folder: Path, state: ServerState) -> None:
    script = Path(__file__).with_name("rings.py")
    ports = [str(state.ports[kind]) for kind in ("object", "container", "account")]
    # -P: this script's folder is no place to import from
    command = [sys.executable, "-P", str(script), str(folder / "etc"), *ports]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise StorageError(f"the embedded S3 server's rings cannot be written: {result.stderr.strip()[-300:]}")


def _start(folder: Path, state: ServerState) -> ServerState:
    """Start the four servers at once and record them before anything else can go wrong."""
    records = []
    for kind in _KINDS:
        command = [str(_programs() / f"swift-{kind}-server"), str(folder / "etc" / f"{kind}.conf"), "--verbose"]
        with (folder / "log" / f"{kind}.log").open("ab") as log:
            # A session of its own: Ctrl-C in a user's terminal must not stop the server under other users.
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=folder, start_new_session=True
            )
        records.append(ProcessRecord.of(process.pid))
        _write_state(folder, replace(state, processes=tuple(records)))
    return replace(state, processes=tuple(records))


def _wait_until_healthy(state: ServerState) -> bool:
    deadline = time.monotonic() + _START_TIMEOUT_SECONDS
    while time.monotonic() < deadline and all(process.is_alive() for process in state.processes):
        if _is_healthy(state):
            return True
        time.sleep(0.05)
    return False


def _is_healthy(state: ServerState) -> bool:
    """Whether the proxy answers, and each of the four listens itself: another program may have taken a port."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # http_proxy is not for loopback
    try:
        with direct.open(f"{state.endpoint.url}/healthcheck", timeout=_ANSWER_SECONDS) as answer:
            if answer.read() != b"OK":
                return False
    except (OSError, HTTPException):  # the latter of another program that speaks something else
        return False
    return all(_listens(process, state.ports[kind]) for kind, process in zip(_KINDS, state.processes, strict=True))


def _listens(process: ProcessRecord, port: int) -> bool:
    try:
        connections = psutil.Process(process.pid).net_connections("tcp4")
    except psutil.Error:
        return False
    return any(x.status == psutil.CONN_LISTEN and x.laddr and x.laddr[1] == port for x in connections)


def _becomes_free(port: int) -> bool:
    deadline = time.monotonic() + _PORT_GRACE_SECONDS
    while (reason := taken(port)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return reason is None


def _free_ports() -> dict[str, int]:
    """A port for each server, all held at once so that they differ."""
    with ExitStack() as together:
        return {kind: port_of(together.enter_context(hold_port())) for kind in _KINDS}
