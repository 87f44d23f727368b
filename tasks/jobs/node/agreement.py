"""What the controllers of a job's nodes tell each other, so that all ranks are started again or none."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

_MEETING_SECONDS = 120.0
"""For which the controller of another node may be late: it starts, or ends its ranks."""
_LOOK_SECONDS = 0.1


@dataclass(frozen=True)
class Failure:
    """Why the ranks of a job do not go on."""

    reason: str
    """In a line, with the rank."""
    decided: bool
    """The program would not go on, or somebody told it to stop: no crash."""
    exit_code: int = 1
    """The job's, if it ends with this."""


class NodeLost(Exception):
    """The controller of another node does not answer."""


class Agreement:
    """One controller's part. What is said is said of a life: the time from a start of all ranks to their end.

    Args:
        store: a torch.distributed store that all controllers reach; of one node, `Memory` does.
        node, nodes: this node, and their number.
    """

    def __init__(self, store: Any, node: int, nodes: int) -> None:
        self._store, self._node, self._nodes = store, node, nodes

    def fail(self, life: int, failure: Failure) -> None:
        """Say that ranks of this node do not go on; the first node's word counts."""
        self._store.compare_set(f"{life}/failure", "", json.dumps(asdict(failure)))

    def failure(self, life: int) -> Failure | None:
        """What the first node said whose ranks do not go on."""
        key = f"{life}/failure"
        return Failure(**json.loads(self._store.get(key))) if self._store.check([key]) else None

    def finish(self, life: int) -> None:
        """Say that all ranks of this node have returned. Once."""
        self._store.add(f"{life}/finished", 1)

    def all_finished(self, life: int) -> bool:
        """Whether the ranks of all nodes have returned."""
        return int(self._store.add(f"{life}/finished", 0)) == self._nodes

    def meet(self, place: str) -> None:
        """Wait until all controllers are at a place of this name.

        Raises:
            NodeLost: one does not come.
        """
        self._store.add(place, 1)
        self._wait(place)

    def part(self, place: str) -> None:
        """As `meet`, but only the first node, which holds the store, waits for the others."""
        self._store.add(place, 1)
        if self._node == 0:
            self._wait(place)

    def _wait(self, place: str) -> None:
        deadline = time.monotonic() + _MEETING_SECONDS
        while (here := int(self._store.add(place, 0))) < self._nodes:
            if time.monotonic() > deadline:
                raise NodeLost(f"{self._nodes - here} of {self._nodes} nodes do not answer")
            time.sleep(_LOOK_SECONDS)

    def of_first(self, name: str, value: Callable[[], str]) -> str:
        """What the first node's `value()` is."""
        if self._node == 0:
            self._store.set(name, value())
        return str(self._store.get(name).decode())


class Memory:
    """What `Agreement` needs of a store, of one node."""

    def __init__(self) -> None:
        self._values: dict[str, bytes] = {}

    def set(self, key: str, value: str) -> None:
        """Replace a value."""
        self._values[key] = value.encode()

    def get(self, key: str) -> bytes:
        """A value that is there."""
        return self._values[key]

    def check(self, keys: list[str]) -> bool:
        """Whether all are there."""
        return all(key in self._values for key in keys)

    def add(self, key: str, amount: int) -> int:
        """Count up from 0."""
        total = int(self._values.get(key, b"0")) + amount
        self.set(key, str(total))
        return total

    def compare_set(self, key: str, expected: str, value: str) -> None:
        """Set a value that is not there, as `expected` is empty."""
        assert not expected
        self._values.setdefault(key, value.encode())


def meeting_store(address: str, port: int, node: int, nodes: int) -> Any:
    """The store of several nodes' controllers, which the first one holds; port 0 there: a free one."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # takes seconds, and one node does without

    timeout = timedelta(seconds=_MEETING_SECONDS)
    return TCPStore(address, port, is_master=node == 0, timeout=timeout, wait_for_workers=False)
