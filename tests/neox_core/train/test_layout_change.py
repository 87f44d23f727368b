"""A training whose layout changes at each restart is the training that was never stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from neox_core.checkpoint.conversion.convert import convert, open_source
from neox_core.config import DataConfig, ModelConfig, ParallelConfig, RunConfig, StorageConfig, ValidationConfig
from neox_core.storage.object_store import ObjectStore
from neox_core.train.identity import training_fingerprint
from neox_core.train.job import TrainJob
from tests.distributed import rendezvous_ports, run_ranks
from tests.neox_core.checkpoint.conversion.test_families import CASES, write_model
from tests.neox_core.train.small_jobs import SOURCES, rows, train_job, write_data
from tests.neox_core.train.small_training import config_for

STEPS, INTERVAL = 8, 2
LAYOUTS = [(2, 1, 1), (1, 2, 1), (1, 1, 2)]
"""Tensor, pipeline and data parallel, of two ranks. The second puts a tied head and its embedding on two of them."""


def config(storage: StorageConfig, model: ModelConfig, layout: tuple[int, int, int]) -> RunConfig:
    base = config_for("gqa", *layout).model_copy(update={"model": model})
    validation = ValidationConfig(interval=100, iterations=1)
    values: dict[str, Any] = {"steps": STEPS, "validation": validation, "checkpoint_interval": INTERVAL}
    train = base.train.model_copy(update=values | {"dry_run": False})
    sources = {name: {"weight": 1} for name in SOURCES}
    data = DataConfig.model_validate({"input": str(base.data.input), "sources": sources})
    wandb = base.wandb.model_copy(update={"mode": "disabled"})
    return base.model_copy(update={"train": train, "data": data, "storage": storage, "wandb": wandb})


def train_jobs(jobs: list[tuple[RunConfig, TrainJob, int | None, int]]) -> list[Any]:
    return [train_job(*job) for job in jobs]


@pytest.mark.parametrize("case", ["llama 2:1", "llama tied", "qwen2", "qwen3", "smollm3"])
def test_layouts_that_change_at_each_restart(
    case: str, storage_config: StorageConfig, store: ObjectStore, tmp_path: Path
) -> None:
    write_model(tmp_path / "base", **CASES[case])
    model = open_source(tmp_path / "base").model
    shards = tmp_path / "shards"  # for the first layout; the others cut them anew
    convert(tmp_path / "base", shards, model, ParallelConfig(tensor=2))
    write_data(tmp_path / "data")
    elsewhere = storage_config.model_copy(update={"url": f"{storage_config.url}/whole"})
    jobs = []
    kills = {LAYOUTS[0]: 4, LAYOUTS[1]: 4, LAYOUTS[2]: None}
    for layout in LAYOUTS:
        run = config(storage_config, model, layout)
        identity = training_fingerprint(run, "d", "w")
        jobs.append((run, TrainJob(tmp_path / "data", shards, tmp_path / "changing", identity), kills[layout]))
    whole = config(elsewhere, model, LAYOUTS[0])
    jobs.append((whole, TrainJob(tmp_path / "data", shards, tmp_path / "whole", identity), None))
    ports = rendezvous_ports(len(jobs))
    for found in run_ranks(train_jobs, 2, [(*job, port) for job, port in zip(jobs, ports, strict=True)]):
        # Killed at the beginning of steps 4 and 6, with checkpoints of 2 and 4; the second goes on from 2.
        assert [begun for _, begun in found] == [[1, 2, 3, 4], [3, 4, 5, 6], [5, 6, 7, 8], [*range(1, 9)]]
        assert [started for started, _ in found[2:]] == [4, 0]
    changing, reference = (rows(job) for _, job, _ in jobs[2:])
    assert list(changing) == list(reference) == [*range(1, STEPS + 1)]
    for name, tolerance in {"train/loss": 1e-6, "train/gradient_norm": 1e-5}.items():
        values = ([row[name] for row in found.values()] for found in (changing, reference))
        np.testing.assert_allclose(*values, rtol=tolerance)
    for name in ("train/lr", "train/sequences_consumed"):
        assert [row[name] for row in changing.values()] == [row[name] for row in reference.values()]
