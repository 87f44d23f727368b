"""Whole jobs on all GPUs: killed, and gone on with in another layout from what was saved.

pytest -m multi_gpu tests/gpu
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from neox_core.checkpoint.conversion.convert import convert
from neox_core.checkpoint.conversion.toy_base import make_random_base
from neox_core.config import DataConfig, ParallelConfig, RunConfig, StorageConfig, ValidationConfig
from neox_core.train.job import TrainJob
from tests.distributed import rendezvous_ports, run_ranks
from tests.gpu.folder_store import run_job
from tests.gpu.several import MARKS, MODEL, RANKS, Layout, Variant
from tests.neox_core.train.small_jobs import SOURCES, rows, write_data

pytestmark = MARKS
STEPS, INTERVAL = 8, 2
HALF = max(1, RANKS // 4)
LAYOUTS: list[Layout] = [(RANKS, 1, 1), (HALF, 2, RANKS // 2 // HALF), (1, 1, RANKS)]
KILLS = (4, 4, None)
"""At the beginning of which of a job's own steps it is killed."""


def config(folder: Path, layout: Layout) -> RunConfig:
    """Validation and a dry run included, as in production; graphs and overlap where there are GPUs."""
    base = Variant("bf16", mode="selective").config(layout)
    settings = {
        "steps": STEPS,
        "validation": ValidationConfig(interval=100, iterations=1),
        "checkpoint_interval": INTERVAL,
        "master_weights": "packed",
    }
    sources = {name: {"weight": 1} for name in SOURCES}
    return base.model_copy(
        update={
            "train": base.train.model_copy(update=settings),
            "data": DataConfig.model_validate({"input": str(base.data.input), "sources": sources}),
            "storage": StorageConfig(url=f"s3://folder{folder}"),
            "wandb": base.wandb.model_copy(update={"mode": "disabled"}),
        }
    )


def test_a_killed_training_goes_on_in_another_layout(tmp_path: Path) -> None:
    make_random_base(MODEL, tmp_path / "base", seed=7)
    shards, data = tmp_path / "shards", tmp_path / "data"  # the layouts cut the weights anew
    convert(tmp_path / "base", shards, MODEL, ParallelConfig(tensor=2))
    write_data(data)
    changing = TrainJob(data, shards, tmp_path / "changing", "a" * 64)
    whole = TrainJob(data, shards, tmp_path / "whole", "b" * 64)
    jobs = [(config(tmp_path / "store", layout), changing, kill) for layout, kill in zip(LAYOUTS, KILLS, strict=True)]
    jobs.append((config(tmp_path / "another", LAYOUTS[0]), whole, None))
    # Each in processes of its own, since a killed one's do not end by themselves.
    found = [run_ranks(run_job, RANKS, *job, port) for job, port in zip(jobs, rendezvous_ports(len(jobs)), strict=True)]
    # Killed at the beginning of steps 4 and 6, with checkpoints of 2 and 4; the second goes on from 2.
    steps = [[1, 2, 3, 4], [3, 4, 5, 6], [5, 6, 7, 8], [*range(1, 9)]]
    assert [[begun for _, begun in ranks] for ranks in found] == [[begun] * RANKS for begun in steps]
    assert [[started for started, _ in ranks] for ranks in found[2:]] == [[4] * RANKS, [0] * RANKS]
    one, other = rows(changing), rows(whole)
    assert list(one) == list(other) == [*range(1, STEPS + 1)]
    for name in ("train/loss", "train/gradient_norm"):
        values = ([row[name] for row in found.values()] for found in (one, other))
        np.testing.assert_allclose(*values, rtol=1e-2, err_msg=name)
    for name in ("train/lr", "train/sequences_consumed"):
        assert [row[name] for row in one.values()] == [row[name] for row in other.values()]
