"""Whether the process of a flow run lives: it has a lock in the workdir, which the kernel drops when it dies."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from infra.processes import ProcessRecord
from neox_core.storage.claims import claim, claim_file, is_claimed


@contextmanager
def at_work(workdir: Path, run: str | None) -> Iterator[None]:
    """While the context lasts, whoever asks `has_died` on any host hears that the process of this flow run lives. A
    second process of the same run waits for the end of the first.

    Args:
        run: the flow run's id; None outside of flows.
    """
    if run is None:
        yield
        return
    with claim(workdir, _name(run), "this flow run", lambda share, text: None):
        process = asdict(ProcessRecord.of(os.getpid())) | {"host": socket.gethostname()}
        claim_file(workdir, _name(run)).write_text(json.dumps(process), encoding="utf-8")
        try:
            yield
        finally:
            forget_process(workdir, run)


def has_died(workdir: Path, run: str) -> bool | None:
    """Whether the process that was at work on a flow run is gone; None: there is none that has begun, or it has come to
    its end."""
    if not claim_file(workdir, _name(run)).exists():
        return None
    return not is_claimed(workdir, _name(run))


def end_process(workdir: Path, run: str) -> None:
    """Have the process of a flow run end, by SIGTERM, if it is one of this host's."""
    process = json.loads(claim_file(workdir, _name(run)).read_text(encoding="utf-8"))
    if process.pop("host") == socket.gethostname():
        ProcessRecord(**process).send(signal.SIGTERM)


def forget_process(workdir: Path, run: str) -> None:
    """Forget the process of a flow run, before another one takes it over."""
    claim_file(workdir, _name(run)).unlink(missing_ok=True)


def _name(run: str) -> str:
    return f"flow-{run}"
