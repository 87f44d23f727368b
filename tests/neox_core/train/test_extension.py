"""A training that is made longer goes on as if it had been meant to be that long."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from neox_core.checkpoint.conversion.convert import convert
from neox_core.checkpoint.conversion.toy_base import make_random_base
from neox_core.config import DataConfig, RunConfig, StorageConfig, ValidationConfig
from neox_core.storage.object_store import ObjectStore
from neox_core.train.identity import training_fingerprint
from neox_core.train.job import TrainJob
from neox_core.train.resuming.lineage import ancestors
from tests.distributed import rendezvous_ports, run_ranks
from tests.neox_core.train.small_jobs import SOURCES, rows, train_job, write_data
from tests.neox_core.train.small_training import config_for

DECAY, INTERVAL = 3, 2


def config(storage: StorageConfig, steps: int, *extends: int) -> RunConfig:
    base = config_for("gqa", 1, 1, 1)
    schedule = base.train.schedule.model_copy(update={"kind": "wsd", "decay_steps": DECAY, "warmup_steps": 2})
    validation = ValidationConfig(interval=100, iterations=1)
    values: dict[str, Any] = {"steps": steps, "extends": extends, "schedule": schedule, "validation": validation}
    train = base.train.model_copy(update=values | {"checkpoint_interval": INTERVAL, "dry_run": False})
    sources = {name: {"weight": 1} for name in SOURCES}
    data = DataConfig.model_validate({"input": str(base.data.input), "sources": sources})
    wandb = base.wandb.model_copy(update={"mode": "disabled"})
    return base.model_copy(update={"train": train, "data": data, "storage": storage, "wandb": wandb})


def train_jobs(jobs: list[tuple[RunConfig, TrainJob, int]]) -> list[Any]:
    return [train_job(config, job, None, port) for config, job, port in jobs]


def test_an_extension_equals_the_longer_training(
    storage_config: StorageConfig, store: ObjectStore, tmp_path: Path
) -> None:
    elsewhere = storage_config.model_copy(update={"url": f"{storage_config.url}/whole"})
    short, long, whole = config(storage_config, 8), config(storage_config, 12, 8), config(elsewhere, 12)
    data, weights = tmp_path / "data", tmp_path / "weights"
    write_data(data)
    make_random_base(short.model, tmp_path / "base", seed=7)
    convert(tmp_path / "base", weights, short.model, short.parallel)

    def job(run: RunConfig, name: str) -> TrainJob:
        identity = training_fingerprint(run, "d", "w")
        return TrainJob(data, weights, tmp_path / name, identity, ancestors(run, "d", "w"))

    jobs = [(short, job(short, "short")), (long, job(long, "long")), (whole, job(whole, "whole"))]
    ports = rendezvous_ports(len(jobs))
    (found,) = run_ranks(train_jobs, 1, [(run, made, port) for (run, made), port in zip(jobs, ports, strict=True)])
    # The shorter one decays after step 5, so that its checkpoint of step 4 is the last that both share.
    assert found == [(0, [*range(1, 9)]), (4, [*range(5, 13)]), (0, [*range(1, 13)])]

    def values(job: TrainJob) -> dict[int, tuple[float, ...]]:
        names = ("train/loss", "train/gradient_norm", "train/lr", "train/sequences_consumed")
        return {step: tuple(row[name] for name in names) for step, row in rows(job).items()}

    (_, shorter), (_, extended), (_, reference) = jobs
    assert values(extended) == values(reference)
    assert values(shorter)[5] == values(reference)[5]
    assert values(shorter)[8] != values(reference)[8]


def test_what_cannot_be_extended_does_not_start_again(storage_config: StorageConfig, tmp_path: Path) -> None:
    run = config(storage_config, 12, 8)
    write_data(tmp_path / "data")
    make_random_base(run.model, tmp_path / "base", seed=7)
    convert(tmp_path / "base", tmp_path / "weights", run.model, run.parallel)
    identity = training_fingerprint(run, "d", "w")
    job = TrainJob(tmp_path / "data", tmp_path / "weights", tmp_path, identity, ancestors(run, "d", "w"))
    (((error, begun),),) = run_ranks(train_jobs, 1, [(run, job, *rendezvous_ports(1))])
    assert re.match(r"train.extends is \[8\], but s3://.* has no checkpoint of such", error)
    assert begun == []
