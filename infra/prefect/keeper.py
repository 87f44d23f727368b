"""Keeps a service running: starts it again when it ends, until it is told to stop.

`python -m infra.prefect.keeper NAME FOLDER PORT`, started by `infra.prefect.up`; on a login node with systemd, that
does the same (infra/systemd).
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from infra.prefect.services import ROOT, SERVICES, ServiceRecord
from infra.processes import ProcessRecord, end_processes

_log = logging.getLogger(__name__)

STOP_SECONDS = 30.0
"""For the service to end by itself when it is told to."""
_FIRST_PAUSE_SECONDS = 1.0
_LONGEST_PAUSE_SECONDS = 60.0


class _Stopped(BaseException):
    """SIGTERM has come."""


def keep(name: str, folder: Path, port: int, command: Sequence[str], pause_seconds: float) -> None:
    """Run the command again and again, with a pause that doubles while it ends soon; returns after SIGTERM, when the
    command has ended too."""
    signal.signal(signal.SIGTERM, _stop)
    own, pause = ProcessRecord.of(os.getpid()), pause_seconds
    service: ProcessRecord | None = None
    try:
        while True:
            ServiceRecord(own, None, port).write(folder, name)
            started = time.monotonic()
            process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL)
            service = ProcessRecord.of(process.pid)
            ServiceRecord(own, service, port).write(folder, name)
            code = process.wait()
            pause = pause_seconds if time.monotonic() - started > _LONGEST_PAUSE_SECONDS else 2 * pause
            _log.warning("the %s has ended with exit code %d: starting it again in %.0f s", name, code, pause)
            time.sleep(min(pause, _LONGEST_PAUSE_SECONDS))
    except _Stopped:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if service:
            end_processes([service], STOP_SECONDS)


def _stop(number: int, frame: Any) -> None:
    raise _Stopped


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    keep(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), SERVICES[sys.argv[1]], _FIRST_PAUSE_SECONDS)
