"""What a training makes of its saves: how long they take, whether the store is behind, and an end if they fail."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path

from neox_core.checkpoint.lease import SupersededError
from neox_core.checkpoint.manifest import Manifest
from neox_core.checkpoint.reports import Reports
from neox_core.storage.atomic import write_atomically
from neox_core.storage.full_disk import write_if_room
from neox_core.train.ends.stopping import Stop, Stopping
from neox_core.train.observe.metrics import METRICS_FILE, validation_losses

SAVED_FILE = "saved"
"""In the training's folder: the step of the newest checkpoint that the job has written, to local disk at least."""
BEHIND_FOLDER = "behind"
"""In the training's folder: a file of each rank that the store fails, with what is behind since when, or whose disk is
full."""


class Saving:
    """One rank's view of its saves.

    Args:
        stopping: told of the time that saves take, and asked to stop when one has failed for good.
        output: the training's folder.
        rank: this rank.
        retain: called after each checkpoint that is in the store, with the validation losses by step.
    """

    def __init__(
        self, stopping: Stopping, output: Path, rank: int, retain: Callable[[Mapping[int, float]], None]
    ) -> None:
        self._output, self._retain = output, retain
        self._stopping, self._rank = stopping, rank
        self._store_file, self._disk_file = (output / BEHIND_FOLDER / f"{kind}_{rank}" for kind in ("rank", "disk"))
        for path in (self._store_file, self._disk_file):
            path.unlink(missing_ok=True)
        self._begun: dict[int, float] = {}

    def begin(self, step: int) -> None:
        """The save of a step begins."""
        self._begun[step] = time.time()

    def written(self, manifest: Manifest) -> None:
        """A checkpoint is whole on local disk, where the next life of this job finds it."""
        write_atomically(self._output / SAVED_FILE, str(manifest.step))

    def published(self, manifest: Manifest) -> None:
        """A checkpoint is in the store."""
        if begun := self._begun.pop(manifest.step, None):
            self._stopping.saved(time.time() - begun)
        self._retain(validation_losses(self._output / METRICS_FILE))

    def failed(self, error: Exception) -> None:
        """A save has failed for good."""
        if isinstance(error, SupersededError):
            self.superseded(error)
        else:
            self._stopping.request(Stop("storage", f"rank {self._rank}: {error}"))

    def superseded(self, error: SupersededError) -> None:
        """Another job of this training is at work."""
        self._stopping.request(Stop("superseded", str(error)))

    def behind(self, reports: Reports, text: str) -> None:
        """The store fails this rank, as the text says; an empty one: it works again."""
        reports.set_behind(bool(text))
        _show(self._store_file, text)

    def on_disk(self, problem: str) -> None:
        """This rank's disk had no room for its files of a checkpoint; an empty text: it had."""
        _show(self._disk_file, problem)


def _show(path: Path, text: str) -> None:
    if not text:
        path.unlink(missing_ok=True)
        return
    write_if_room(path, text)  # the log says it too


def behind(output: Path) -> list[str]:
    """What is behind in the training of this folder, a line for each rank whose store fails or whose disk is full."""
    found = []
    for path in sorted((output / BEHIND_FOLDER).glob("*_*")):
        try:
            found.append(path.read_text(encoding="utf-8"))
        except FileNotFoundError:  # it has worked again this moment
            continue
    return found
