"""What the controller of a node is to run."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

CONTROLLER_VARIABLE = "LLEMMA_CONTROLLER_PID"
"""Of the environment of a rank: the controller that started it; without one, a rank is a task of SLURM's."""


@dataclass(frozen=True)
class Restarts:
    """How ranks are started again within their job when one of them dies or hangs."""

    limit: int
    """How often in a row, although nothing new was saved."""
    saved: Path
    """File with a number that grows with each save; absent before the first. The first node sees it."""

    def saved_so_far(self) -> int:
        """The number; 0 if there is none."""
        try:
            return int(self.saved.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return 0


@dataclass(frozen=True)
class NodePlan:
    """One node's part of a job."""

    folder: Path
    """The submission's."""
    job_id: str
    """The scheduler's; empty: the controller's pid."""
    ranks: int
    """Of this node."""
    node: int = 0
    nodes: int = 1
    index: int = 0
    """Of the task among the submission's."""
    restarts: Restarts | None = None
    """None: the first rank that fails ends the job."""
    seconds: float | None = None
    """Until the job's time is over; None: the scheduler sees to that."""
    address: str = "127.0.0.1"
    """Of the first node."""
    port: int = 0
    """Where controllers of several nodes meet, on the first one."""
    is_told_to_stop: bool = False
    """SIGTERM announces the end and is passed on to the ranks; False: it is the end."""

    def to_json(self) -> str:
        """For a command line."""
        return json.dumps(asdict(self), default=str)

    @classmethod
    def from_json(cls, text: str) -> NodePlan:
        """Read what `to_json` wrote."""
        content = json.loads(text)
        restarts = content.pop("restarts")
        if restarts:
            restarts = Restarts(restarts["limit"], Path(restarts["saved"]))
        return cls(**content | {"folder": Path(content["folder"]), "restarts": restarts})

    @property
    def first_rank(self) -> int:
        """Of this node's."""
        return self.node * self.ranks
