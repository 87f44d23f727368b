"""The server that Prefect starts for a run that has none; Prefect ends it only if the run's process ends in order."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from dataclasses import asdict

import psutil  # type: ignore[import-untyped]

from infra.processes import ProcessRecord, end_processes

logger = logging.getLogger(__name__)

_OWNER = "LLEMMA_PREFECT_OWNER"
_HOME = "PREFECT_HOME"
_PROGRAM = "prefect.server.api.server:create_app"
_GRACE_SECONDS = 5.0


def own_prefect_server() -> None:
    """Mark the server that this process may start as its own; end those of killed runs with the same PREFECT_HOME.

    They would hold the database's file, and nobody else would ever end them.
    """
    orphans = list(_orphans(os.environ[_HOME]))
    if orphans:
        logger.info("ending %d Prefect servers that killed runs have left", len(orphans))
        end_processes(orphans, _GRACE_SECONDS)
    os.environ[_OWNER] = json.dumps(asdict(ProcessRecord.of(os.getpid())))


def _orphans(home: str) -> Iterator[ProcessRecord]:
    for process in psutil.process_iter():
        try:
            environment = process.environ() if _PROGRAM in process.cmdline() else {}
            owner = environment.get(_OWNER)
            if owner and environment.get(_HOME) == home and not ProcessRecord(**json.loads(owner)).is_alive():
                yield ProcessRecord.of(process.pid)
        except (psutil.Error, ProcessLookupError):
            continue  # it has ended meanwhile, or is another user's
