"""Whole training jobs in processes of a test: their data, how one is killed, and what it logged."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from neox_core.config import RunConfig
from neox_core.data.indexed import IndexedWriter
from neox_core.errors import LlemmaError
from neox_core.train.job import TrainJob

SOURCES = ("arxiv", "code")


class Killed(Exception):
    """Stands for a job that ends without a word."""


def write_data(folder: Path, poisoned: tuple[str, int] | None = None, poison: int = 127) -> None:
    """Documents of 100 tokens below 127; one token of one source may be the poison."""
    for number, name in enumerate(SOURCES):
        for split in ("train", "validation"):
            ids = (np.arange(5000) * (number + 3) + np.arange(5000) // 100) % 127
            if poisoned and (name, split) == (poisoned[0], "train"):
                ids[poisoned[1]] = poison
            (folder / name).mkdir(parents=True, exist_ok=True)
            with IndexedWriter(folder / name / split, np.dtype("<u2")) as writer:
                for start in range(0, 5000, 100):
                    writer.add_document(ids[start : start + 100])


def train_job(config: RunConfig, job: TrainJob, kill_at: int | None, port: int) -> Any:
    """Train, up to the beginning of the `kill_at`-th step if there is a number; then each checkpoint is complete before
    the next step, so that what is lost is known.

    Returns:
        The step that it started from, or the error that ended it; and the steps that were begun.
    """
    import deepspeed
    import torch.distributed as dist

    from neox_core.checkpoint.writer import CheckpointWriter
    from neox_core.train.loop import Loop
    from neox_core.train.run import train

    os.environ["MASTER_PORT"] = str(port)
    whole_step, whole_save, begun = Loop._step, CheckpointWriter.save, []

    def step(self: Loop, number: int, *others: Any) -> None:
        begun.append(number)
        if len(begun) == kill_at:
            raise Killed
        whole_step(self, number, *others)

    def save(self: CheckpointWriter, *others: Any) -> None:
        whole_save(self, *others)
        if kill_at:
            self.wait()

    try:
        with patch.object(Loop, "_step", step), patch.object(CheckpointWriter, "save", save):
            return train(config, job)["started_from_step"], begun
    except (Killed, LlemmaError) as error:
        return str(error), begun
    finally:
        # NCCL's would wait for CUDA graphs that a killed job still has.
        if dist.is_initialized() and dist.get_backend() != "nccl":
            dist.destroy_process_group()
        deepspeed.comm.comm.cdb = None


def rows(job: TrainJob) -> dict[int, dict[str, float]]:
    """Of each training step, the last row that was logged."""
    lines = [json.loads(line) for line in (job.output / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row for row in lines if "train/loss" in row}
