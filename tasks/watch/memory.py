"""What the watcher remembers in a workdir: the events that it has told, and how often it has had what run again."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path

from neox_core.storage.atomic import write_atomically

_FILE = "watch.json"
_FORGET_SECONDS = 90 * 86400.0


@dataclass(frozen=True)
class Memory:
    """A workdir's; to be had by one process at a time."""

    path: Path
    told: dict[str, float] = field(default_factory=dict)
    """Unix seconds, by event."""
    reruns: dict[str, tuple[int, int]] = field(default_factory=dict)
    """By flow run: the last saved step when it was run again, and how often it was without a later one."""

    @classmethod
    def of(cls, workdir: Path) -> Memory:
        """Read it; empty before the first event. Old events are left out."""
        path = workdir / _FILE
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return cls(path)
        young = time.time() - _FORGET_SECONDS
        told = {event: when for event, when in content["told"].items() if when > young}
        return cls(path, told, {run: (step, count) for run, (step, count) in content["reruns"].items()})

    def note_told(self, event: str) -> None:
        """An event was told."""
        self.told[event] = time.time()
        self._write()

    def may_rerun(self, run: str, saved: int, most: int) -> bool:
        """Whether a run may be run again: as long as checkpoints advance, or `most` times without. If so, it counts."""
        step, count = self.reruns.get(run, (saved, 0))
        count = 1 if saved > step else count + 1
        if count > most:
            return False
        self.reruns[run] = (max(step, saved), count)
        self._write()
        return True

    def _write(self) -> None:
        write_atomically(self.path, json.dumps({"told": self.told, "reruns": self.reruns}, indent=1))
