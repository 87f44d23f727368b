"""What a node's controller knows of its ranks, in a file that others read."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from infra.processes import ProcessRecord
from neox_core.storage.atomic import write_atomically


@dataclass
class ControllerReport:
    """A controller's processes, and exit codes in the order in which ranks ended."""

    controller: ProcessRecord
    ranks: list[ProcessRecord] = field(default_factory=list)
    exits: list[tuple[int, int]] = field(default_factory=list)
    """(rank, exit code) since the last start; ranks that the controller itself ended are not among them."""
    timed_out: bool = False
    restarts: list[str] = field(default_factory=list)
    """Why the ranks were started again since something new was saved, a line each; of the first node."""

    @classmethod
    def read(cls, folder: Path, node: int = 0) -> ControllerReport | None:
        """The report of a node's controller in `folder`; None before it has started."""
        try:
            content = json.loads(_report_file(folder, node).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        return cls(
            controller=ProcessRecord(**content["controller"]),
            ranks=[ProcessRecord(**record) for record in content["ranks"]],
            exits=[(rank, code) for rank, code in content["exits"]],
            timed_out=content["timed_out"],
            restarts=content["restarts"],
        )

    def write(self, folder: Path, node: int = 0) -> None:
        """Replace the report in `folder`."""
        write_atomically(_report_file(folder, node), json.dumps(asdict(self)))


def exits_of(folder: Path) -> dict[int, str]:
    """How ranks ended that were not ended by their controllers, in words, of all nodes that have reported."""
    found, node = dict[int, str](), 0
    while report := ControllerReport.read(folder, node):
        found |= {rank: ending(code) for rank, code in report.exits if code}
        node += 1
    return found


def ending(code: int) -> str:
    """What an exit code says."""
    return f"killed by signal {-code}" if code < 0 else f"ended with exit code {code}"


def _report_file(folder: Path, node: int) -> Path:
    return folder / ("controller.json" if node == 0 else f"controller-{node}.json")
