"""A PostgreSQL server on loopback, for tests."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.ports import free_port

USER = "postgres"
"""Of the system: the server refuses root."""


def programs() -> Path | None:
    """The folder of Debian's and Ubuntu's newest PostgreSQL, or of the one on the PATH."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    on_path = shutil.which("initdb")
    paths = [*([Path(on_path)] if on_path else []), *found]
    return paths[-1].parent if paths else None


@contextmanager
def postgresql(folder: Path, password: str) -> Iterator[str]:
    """A server with an empty database `prefect` of the role `llemma`; its URL, password included.

    Args:
        folder: to be made; all folders above must be open to other users.
    """
    bin_folder = programs()
    assert bin_folder
    folder.mkdir(mode=0o700)
    if os.getuid() == 0:
        owner = pwd.getpwnam(USER)
        os.chown(folder, owner.pw_uid, owner.pw_gid)
    port = free_port()
    _run(bin_folder / "initdb", "--pgdata", folder / "data", "--auth=scram-sha-256", "--auth-local=trust")
    options = f"-p {port} -h 127.0.0.1 -k {folder}"
    control = (bin_folder / "pg_ctl", "--pgdata", folder / "data", "--wait", "--timeout=300", "--log", folder / "log")
    _run(*control, "--options", options, "start")
    try:
        ask = (bin_folder / "psql", "--host", folder, "--port", str(port), "--dbname", "postgres", "--command")
        _run(*ask, f"create role llemma login password '{password}'")
        _run(*ask, "create database prefect owner llemma")
        yield f"postgresql+asyncpg://llemma:{password}@127.0.0.1:{port}/prefect"
    finally:
        _run(*control, "--mode=fast", "stop")


def _run(*command: str | Path) -> None:
    as_user = ("runuser", "-u", USER, "--") if os.getuid() == 0 else ()
    ended = subprocess.run([*as_user, *command], cwd="/", capture_output=True, text=True, timeout=320, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
