"""Where and how ranks are killed: by themselves, when they are at a moment that a list of kills names."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from tasks.jobs.node.report import ControllerReport

MOMENTS = ("step", "copy", "write", "upload", "commit", "load")
WHO = ("rank", "group", "supervisor", "hang")

_NOTHING_LOADED = 4
"""Steps of a life after which it will load nothing."""


@dataclass(frozen=True)
class Kill:
    """Whoever is killed when a rank is at a moment for the `count`-th time in its life."""

    who: str
    moment: str
    rank: int
    count: int


def random_kills(generator: random.Random, count: int, world_size: int, hangs: bool) -> list[Kill]:
    """Of all kinds and moments."""
    found = []
    for _ in range(count):
        moment = generator.choice(MOMENTS)
        who = generator.choices(WHO, (10, 5, 3, 1 if hangs and moment in ("step", "upload") else 0))[0]
        rank = 0 if moment == "commit" else generator.randrange(world_size)
        times = generator.randint(1, 3) if moment == "step" else 1
        found.append(Kill(who, moment, rank, times))
    return found


class KillList:
    """The kills of a training, in a folder, one after the other over all its lives."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._done = folder / "kills.jsonl"

    def write(self, kills: list[Kill]) -> None:
        """Begin with these."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "planned.json").write_text(json.dumps([asdict(kill) for kill in kills]))
        self._done.touch()

    def done(self) -> list[Kill]:
        """Those that have happened."""
        return [Kill(**json.loads(line)) for line in self._done.read_text().splitlines()]

    def next(self) -> Kill | None:
        """The one that is to come."""
        planned = json.loads((self.folder / "planned.json").read_text())
        done = len(self.done())
        return Kill(**planned[done]) if done < len(planned) else None

    def happen(self, kill: Kill) -> None:
        """Write it down, and be killed."""
        with self._done.open("a") as file:
            file.write(json.dumps(asdict(kill)) + "\n")
            file.flush()
            os.fsync(file.fileno())
        if kill.who == "supervisor":
            os.kill(os.getppid(), signal.SIGKILL)
            time.sleep(60)
        if kill.who == "hang":
            os.kill(os.getpid(), signal.SIGSTOP)
        if kill.who == "group":
            report = ControllerReport.read(Path(os.environ["SUBMITIT_FOLDER"]))
            for process in report.ranks if report else ():
                if process.pid != os.getpid():
                    process.send(signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)


@contextlib.contextmanager
def killed_by(kills: KillList, rank: int) -> Iterator[None]:
    """In a rank: be killed when the next kill of the list is this rank's, at the moment that it names."""
    from neox_core.checkpoint import uploads
    from neox_core.checkpoint.host_memory import HostBuffers
    from neox_core.checkpoint.writer import CheckpointWriter
    from neox_core.storage.object_store import ObjectStore
    from neox_core.train.loop import Loop
    from neox_core.train.resuming import train_checkpoints as resume

    times: dict[str, int] = {}

    def at(moment: str, whole: Callable[..., Any], after: bool = False) -> Callable[..., Any]:
        """`whole`, before or after which the rank may be killed."""

        def called(*args: Any, **kwargs: Any) -> Any:
            result = whole(*args, **kwargs) if after else None
            times[moment] = times.get(moment, 0) + 1
            kill = kills.next()
            if kill and kill.moment == "load" and times.get("step", 0) > _NOTHING_LOADED:
                kill = replace(kill, moment="step")  # there was no checkpoint to load
            if kill and (kill.moment, kill.rank) == (moment, rank) and times[moment] >= kill.count:
                kills.happen(kill)
            return result if after else whole(*args, **kwargs)

        return called

    with contextlib.ExitStack() as stack:
        for owner, name, moment, after in (
            (Loop, "_step", "step", False),
            (HostBuffers, "copy", "copy", False),
            (CheckpointWriter, "_write_file", "write", False),
            (ObjectStore, "put_file", "upload", True),
            (uploads, "publish_manifest", "commit", False),
            (resume, "download_checkpoint", "load", True),
        ):
            stack.enter_context(patch.object(owner, name, at(moment, getattr(owner, name), after)))
        yield


def end_with_parent() -> None:
    """Be killed when the parent is."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
