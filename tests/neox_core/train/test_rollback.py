"""A training that goes back: past the bad batch, repeating nothing, and the same when it is killed on the way."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest

from neox_core.checkpoint.conversion.convert import convert
from neox_core.checkpoint.conversion.toy_base import make_random_base
from neox_core.checkpoint.manifest import checkpoint_key, list_checkpoints, object_key
from neox_core.config import DataConfig, GuardConfig, RunConfig, StorageConfig, ValidationConfig
from neox_core.data.dataset import MixtureDataset, open_training_data
from neox_core.data.skipped import SkippedSequences
from neox_core.storage.object_store import ObjectStore
from neox_core.train.job import TrainJob
from tests.distributed import rendezvous_ports, run_ranks
from tests.neox_core.train.small_jobs import SOURCES, rows, train_job, write_data
from tests.neox_core.train.small_training import BATCH, config_for

POISON = 127
"""A token that makes the loss NaN, on the data-parallel rank that has it."""
STEPS, INTERVAL, BAD_STEP = 9, 3, 5


def config(storage: StorageConfig, **train: Any) -> RunConfig:
    values = {
        "steps": STEPS,
        "checkpoint_interval": INTERVAL,
        "validation": ValidationConfig(interval=100, iterations=1),
        "guard": GuardConfig(on_not_finite="rollback"),
    }
    base = config_for("gqa", 1, 1, 2, **values | train)
    data = DataConfig.model_validate(
        {"input": str(base.data.input), "sources": {name: {"weight": 1} for name in SOURCES}}
    )
    wandb = base.wandb.model_copy(update={"mode": "disabled"})
    return base.model_copy(update={"data": data, "storage": storage, "wandb": wandb})


@contextmanager
def poisonous() -> Iterator[None]:
    import torch

    from neox_core.parallel.loss import ChunkedLoss

    healthy = ChunkedLoss.__call__

    def loss(self: ChunkedLoss, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return healthy(self, hidden, targets) + (torch.nan if (targets == POISON).any() else 0.0)

    with patch.object(ChunkedLoss, "__call__", loss):
        yield


def train_jobs(config: RunConfig, jobs: list[tuple[TrainJob, int | None]], ports: list[int]) -> list[Any]:
    """Train one job after another; those with a number are killed when that many steps have begun.

    Before the last, the last step's checkpoint is deleted.
    """
    results = []
    for (job, kill_at), port in zip(jobs, ports, strict=True):
        if job is jobs[-1][0] and os.environ["RANK"] == "0":  # which decides from where a job resumes
            store = ObjectStore(config.storage)
            store.delete([info.key for info in store.list(object_key(job.prefix, checkpoint_key(STEPS), ""))])
        with poisonous():
            results.append(train_job(config, job, kill_at, port))
    return results


def values(job: TrainJob) -> dict[int, tuple[float, ...]]:
    """Loss, gradient norm and sequences of each step."""
    names = ("train/loss", "train/gradient_norm", "train/sequences_consumed")
    return {step: tuple(row[name] for name in names) for step, row in rows(job).items()}


def prepare(run: RunConfig, folder: Path) -> tuple[MixtureDataset, str, int]:
    """Weights and data, with poison in the bad step's batch, on the second data-parallel rank.

    Returns:
        The data without poison, and the source and the place in its file that has it.
    """
    write_data(folder / "data")
    clean = open_training_data(folder / "data", run)
    name, places = clean.places((BAD_STEP - 1) * BATCH + 3)
    write_data(folder / "data", (name, int(places[7])), POISON)
    make_random_base(run.model, folder / "base", seed=7)
    convert(folder / "base", folder / "weights", run.model, run.parallel)
    return clean, name, int(places[7])


def test_rollback(storage_config: StorageConfig, store: ObjectStore, tmp_path: Path) -> None:
    run = config(storage_config)
    data, weights = tmp_path / "data", tmp_path / "weights"
    clean, name, place = prepare(run, tmp_path)

    whole = TrainJob(data, weights, tmp_path / "whole", "a" * 64)
    killed = TrainJob(data, weights, tmp_path / "killed", "b" * 64)
    lost = replace(whole, output=tmp_path / "lost")
    # Steps 1 to 5 and, before 5 is known to be bad, 6; then 4 again and so on: the ninth is 6 the second time.
    # The last job starts from a checkpoint after the rollback, in a new folder.
    jobs = [(whole, None), (killed, 9), (killed, None), (lost, None)]
    for found in run_ranks(train_jobs, 2, run, jobs, rendezvous_ports(len(jobs))):
        assert found == [
            (0, [1, 2, 3, 4, 5, 6, 4, 5, 6, 7, 8, 9]),
            ("", [1, 2, 3, 4, 5, 6, 4, 5, 6]),
            (3, [4, 5, 6, 7, 8, 9]),
            (6, [7, 8, 9]),
        ]

    window = SkippedSequences(3, 3 * BATCH, 2 * BATCH)
    assert values(whole)[STEPS][2] == (STEPS + 2) * BATCH
    assert values(killed) == values(whole)
    manifests = list_checkpoints(store, whole.prefix)
    assert [(m.step, m.sequences_consumed) for m in manifests] == [(3, 3 * BATCH), (6, 8 * BATCH), (9, 11 * BATCH)]
    assert [[SkippedSequences(**w) for w in m.skipped] for m in manifests] == [[], [window], [window]]
    assert manifests[-1].consumed == clean.consumed(11 * BATCH)
    check_incident(json.loads((whole.output / "incidents.jsonl").read_text()), name, place)
    assert json.loads(store.get_text(f"{whole.prefix}/incidents.jsonl") or "")["action"] == "rollback"
    assert values(lost) == values(whole)
    assert (lost.output / "incidents.jsonl").read_text() == (whole.output / "incidents.jsonl").read_text()


def stop_job(config: RunConfig, job: TrainJob) -> Any:
    """How the job ended, and the steps whose checkpoints were complete then; uploads take seconds."""
    put_file = ObjectStore.put_file

    def slow(*arguments: Any) -> None:
        time.sleep(2)
        put_file(*arguments)

    with poisonous(), patch.object(ObjectStore, "put_file", slow):
        found = train_job(config, job, None, int(os.environ["MASTER_PORT"]))
    return *found, [manifest.step for manifest in list_checkpoints(ObjectStore(config.storage), job.prefix)]


def test_a_training_that_stops_has_saved_and_logged_what_it_did(storage_config: StorageConfig, tmp_path: Path) -> None:
    run = config(storage_config, guard=GuardConfig(on_not_finite="stop"), checkpoint_interval=BAD_STEP - 1)
    prepare(run, tmp_path)
    job = TrainJob(tmp_path / "data", tmp_path / "weights", tmp_path / "output", "a" * 64)
    for error, begun, saved in run_ranks(stop_job, 2, run, job):
        assert error.startswith(f"step {BAD_STEP}: loss nan, ")
        assert begun == [1, 2, 3, 4, 5, 6]  # it is known to be bad when the next one was begun
        assert saved == [BAD_STEP - 1]
    assert np.isnan(rows(job)[BAD_STEP]["train/loss"])


def check_incident(record: dict[str, Any], source: str, place: int) -> None:
    assert (record["step"], record["problem"], record["action"]) == (BAD_STEP, "not finite", "rollback")
    assert record["loss"] == "nan"
    assert record["ranks"] == [1]
    assert (record["first_sequence"], record["sequences"]) == ((BAD_STEP - 1) * BATCH, BATCH)
    assert record["sources"] == dict.fromkeys(SOURCES, BATCH // 2)
    assert list(record["gradient_norms"]) == ["embedding", "blocks_00", "blocks_01", "head", "norms"]
    # The loss alone is not finite.
    assert np.hypot.reduce(list(record["gradient_norms"].values())) == pytest.approx(record["gradient_norm"], rel=1e-5)
    documents = record["documents"]  # of 100 tokens, in sequences of 32 + 1
    assert any(place // 100 in sequence for sequence in documents[source])
    assert {name: len(sequences) for name, sequences in documents.items()} == record["sources"]
    assert all(1 <= len(sequence) <= 2 for sequences in documents.values() for sequence in sequences)
