"""The two programs that stay: Prefect's server and the worker; their commands, and what is noted down of them."""

from __future__ import annotations

import json
import os
import urllib.request
from dataclasses import asdict, dataclass
from http.client import HTTPException
from pathlib import Path

from infra.processes import ProcessRecord
from neox_core.storage.atomic import write_atomically

ROOT = Path(__file__).parents[2]
COMMAND = str(Path(__file__).with_name("prefect.sh"))
POOL = "llemma"
_ANSWER_SECONDS = 30.0
"""Of a server that has taken the question: one on a busy machine is slow."""
SERVER, WORKER = "server", "worker"

SERVICES: dict[str, tuple[str, ...]] = {
    SERVER: (COMMAND, "server", "start"),
    WORKER: (COMMAND, "worker", "start", "--pool", POOL),
}
"""By name, in the order in which they start; infra/systemd has the same."""

DEPLOY: tuple[tuple[str, ...], ...] = (
    (COMMAND, "work-pool", "create", POOL, "--type", "process", "--overwrite"),
    (COMMAND, "--no-prompt", "deploy", "--all"),
)
"""What is to be done before the worker starts, in the repository's folder."""


def default_folder() -> Path:
    """Where server and worker keep data, logs and process ids: PREFECT_HOME, or runs/prefect (as env.sh has it)."""
    return Path(os.environ.get("PREFECT_HOME") or ROOT / "runs" / "prefect").resolve()


@dataclass(frozen=True)
class ServiceRecord:
    """A service that was started."""

    keeper: ProcessRecord
    """Starts the service again when it ends."""
    service: ProcessRecord | None
    """None: it is between two starts."""
    port: int
    """The server's."""

    @classmethod
    def read(cls, folder: Path, name: str) -> ServiceRecord | None:
        """What is noted down in the folder; None if there is nothing."""
        try:
            content = json.loads(_file(folder, name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        service = ProcessRecord(**content["service"]) if content["service"] else None
        return cls(ProcessRecord(**content["keeper"]), service, content["port"])

    @property
    def processes(self) -> list[ProcessRecord]:
        """The keeper first, which would start another."""
        return [self.keeper, *([self.service] if self.service else [])]

    @property
    def is_up(self) -> bool:
        """Whether its keeper is alive."""
        return self.keeper.is_alive()

    def write(self, folder: Path, name: str) -> None:
        """Note it down."""
        write_atomically(_file(folder, name), json.dumps(asdict(self)))


def forget(folder: Path, name: str) -> None:
    """Delete what is noted down of a service that has ended."""
    _file(folder, name).unlink(missing_ok=True)


def log_file(folder: Path, name: str) -> Path:
    """The service's log, and its keeper's."""
    return folder / "services" / f"{name}.log"


def page_url(port: int) -> str:
    """Where the server's pages are."""
    return f"http://{os.environ.get('PREFECT_SERVER_API_HOST', '127.0.0.1')}:{port}"


def answers(api: str) -> bool:
    """Whether the server at this address, PREFECT_API_URL's, is ready."""
    try:
        with urllib.request.urlopen(f"{api}/health", timeout=_ANSWER_SECONDS):
            return True
    except (OSError, HTTPException):  # the latter of a program that speaks something else
        return False


def running_page(folder: Path) -> str | None:
    """Where the pages of the server that was started in the folder are; None if it does not run."""
    record = ServiceRecord.read(folder, SERVER)
    return page_url(record.port) if record and record.is_up else None


def _file(folder: Path, name: str) -> Path:
    return folder / "services" / f"{name}.json"
