"""A whole training job on a GPU: dry run, weights, steps, checkpoints, and how it goes on after it was killed.

pytest -m gpu tests/gpu
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from neox_core.checkpoint.conversion.convert import convert
from neox_core.checkpoint.conversion.toy_base import make_random_base
from neox_core.config import DataConfig, RunConfig, StorageConfig, ValidationConfig
from neox_core.train.job import TrainJob
from tests.distributed import rendezvous_ports, run_ranks
from tests.gpu.folder_store import run_job
from tests.neox_core.train.small_jobs import SOURCES, rows, write_data
from tests.neox_core.train.small_training import MODELS, config_for

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
STEPS, INTERVAL = 9, 4
SIZES = {"hidden_size": 1024, "head_dim": 128, "num_layers": 6, "intermediate_size": 2816, "num_kv_heads": 4}
"""Weights that fill more memory than all else, so that a second copy of anything would show."""


def config(folder: Path) -> RunConfig:
    validation = ValidationConfig(interval=100, iterations=1)
    settings: dict[str, Any] = {"steps": STEPS, "checkpoint_interval": INTERVAL, "validation": validation}
    base = config_for("gqa", 1, 1, 1, precision="bf16", master_weights="packed", **settings)
    sources = {name: {"weight": 1} for name in SOURCES}
    return base.model_copy(
        update={
            "model": MODELS["gqa"].model_copy(update=SIZES),
            "data": DataConfig.model_validate({"input": str(base.data.input), "sources": sources}),
            "storage": StorageConfig(url=f"s3://folder{folder}"),
            "launch": base.launch.model_copy(update={"device": "cuda"}),
            "wandb": base.wandb.model_copy(update={"mode": "disabled"}),
        }
    )


def test_a_killed_job_goes_on_with_the_same_losses_in_the_same_memory(tmp_path: Path) -> None:
    run, data, weights = config(tmp_path / "store"), tmp_path / "data", tmp_path / "weights"
    write_data(data)
    make_random_base(run.model, tmp_path / "base", seed=7)
    convert(tmp_path / "base", weights, run.model, run.parallel)
    whole = TrainJob(data, weights, tmp_path / "whole", "a" * 64)
    killed = TrainJob(data, weights, tmp_path / "killed", "b" * 64)
    steps = list(range(1, STEPS + 1))
    ports = rendezvous_ports(3)
    jobs = [(whole, None), (killed, 7), (killed, None)]
    # A process each, as in a cluster: nothing of the killed job is left on the device.
    found = [run_ranks(run_job, 1, run, job, at, port)[0] for (job, at), port in zip(jobs, ports, strict=True)]
    assert found == [(0, steps), ("", steps[:7]), (INTERVAL, steps[INTERVAL:])]

    first, again = rows(whole), rows(killed)
    assert list(first) == list(again) == steps
    assert first[STEPS]["train/loss"] < first[1]["train/loss"]
    for step in steps:
        for name in ("train/loss", "train/gradient_norm"):
            # Attention's backward pass may add in another order each time.
            assert again[step][name] == pytest.approx(first[step][name], rel=1e-2), (step, name)
        assert again[step]["train/sequences_consumed"] == first[step]["train/sequences_consumed"]
    peak = "memory/allocated_gib"
    # What is loaded passes through the device in pieces of one size; a second copy of Adam's moments would take 0.5.
    assert again[STEPS][peak] < first[STEPS][peak] + 0.2
