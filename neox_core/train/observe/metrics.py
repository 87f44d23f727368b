"""Metrics: a JSONL file that the report reads, and Weights & Biases."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import TracebackType
from uuid import uuid4

from neox_core.config import RunConfig
from neox_core.storage.atomic import write_atomically
from neox_core.storage.object_store import ObjectStore
from neox_core.train.observe.row_file import RowFile, restore
from neox_core.train.observe.wandb_run import StartedRun, WandbRun, start_wandb

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
INCIDENTS_FILE = "incidents.jsonl"
_WRITER_FILE = "metrics.writer"
"""Next to the metrics: a token of the job that came last."""
_LOSS = "validation/loss"
_SHOWN = ("train/", "validation/", "guard/")


class MetricsLog:
    """Writes one row per call, on rank 0 only; on other ranks it does nothing.

    A run that is resumed continues its file and its W&B run, whose id is the training's fingerprint. `backup` puts the
    file next to the checkpoints in the store, from where it comes back if the folder is lost, or is one that other jobs
    have not written to since. A job in whose folder another one has begun to write, writes no more.
    """

    def __init__(
        self, config: RunConfig, folder: Path, store: ObjectStore, prefix: str, run_id: str, rank: int
    ) -> None:
        self._active = rank == 0
        self._wandb: StartedRun | None = None
        if not self._active:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / METRICS_FILE
        self._store, self._key = store, f"{prefix}/{METRICS_FILE}"
        restore(self._path, store.get_text(self._key))
        self._rows = RowFile(self._path)
        self._token, self._writer = uuid4().hex, folder / _WRITER_FILE
        write_atomically(self._writer, self._token)
        if config.wandb.mode != "disabled":
            self._wandb = start_wandb(config, folder, WandbRun(run_id, "train", run_id))

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._active:
            return
        self._rows.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=int(error is not None))

    def log(self, step: int, **values: float) -> None:
        """Record values of one step; `__` in a name stands for the `/` that groups charts. The log shows some."""
        if not self._writes():
            return
        row = {name.replace("__", "/"): value for name, value in values.items()}
        self._rows.add({"step": step, "time": time.time(), **row})
        shown = {name: value for name, value in row.items() if name.startswith(_SHOWN)}
        logger.info("step %d  %s", step, "  ".join(f"{name} {value:.5g}" for name, value in shown.items()))
        if self._wandb is not None:
            self._wandb.log({"step": step} | row)

    def note(self, name: str, text: str) -> None:
        """Put a text into the summary of the W&B run."""
        if self._active and self._wandb is not None:
            self._wandb.note(name, text)

    def backup(self) -> Callable[[], None]:
        """What copies the rows so far to the store when it is called, in whatever thread."""
        if not self._writes():
            return lambda: None
        return partial(self._store.put_text, self._key, self._rows.text())

    def _writes(self) -> bool:
        """Whether this is the rank, and the job, that writes."""
        return self._active and self._writer.read_text(encoding="utf-8") == self._token


def validation_losses(metrics: Path) -> dict[int, float]:
    """By step, as the metrics have them; the last of a step that was repeated. What is no number is the worst."""
    if not metrics.is_file():
        return {}
    lines = metrics.read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines if line.endswith("}") and _LOSS in line]
    return {row["step"]: math.inf if math.isnan(row[_LOSS]) else row[_LOSS] for row in rows}
