"""Steps of the real loop on a GPU, in which the host may not wait for the device."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from neox_core.config import ValidationConfig, batch_geometry
from neox_core.data.mixture import Mixture
from tests.distributed import run_ranks
from tests.neox_core.train.small_training import SEQUENCE, config_for

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
STEPS = 6


def train(folder: Path) -> list[dict[str, float]]:
    """The rows of a training whose steps from the second on raise an error where the host waits."""
    from neox_core.parallel.mesh import build_mesh, init_distributed
    from neox_core.train.dry_run import zero_weights
    from neox_core.train.engine import build_engine
    from neox_core.train.loop import Loop
    from neox_core.train.profiler import StepProfiler
    from neox_core.train.telemetry import Telemetry

    settings: dict[str, Any] = {"steps": STEPS, "precision": "bf16", "checkpoint_interval": 100}
    config = config_for("gqa", 1, 1, 1, validation=ValidationConfig(interval=100, iterations=1), **settings)
    config = config.model_copy(update={"launch": config.launch.model_copy(update={"device": "cuda"})})
    mesh, geometry = build_mesh(config.parallel, init_distributed(config.launch)), batch_geometry(config)
    engine = build_engine(config, mesh, geometry, zero_weights(config))
    rows: list[dict[str, float]] = []
    metrics: Any = SimpleNamespace(log=lambda step, **values: rows.append({"step": step, **values}))
    mixture = Mixture({"arxiv": 1.0, "code": 1.0})
    data: Any = SimpleNamespace(
        mixture=mixture, sequences=lambda indices: np.ones((len(indices), SEQUENCE + 1), dtype=np.int64)
    )

    def on_beat(place: str) -> None:
        if place == "step 2":
            torch.cuda.set_sync_debug_mode("error")
        elif not place.startswith("step") or place == f"step {STEPS}":
            torch.cuda.set_sync_debug_mode("default")

    profiler = StepProfiler(None, folder, mesh.rank)
    with Telemetry(config, mesh, geometry, engine, mixture, metrics, profiler, 1e15) as telemetry:
        Loop(
            engine=engine,
            train=config.train,
            geometry=geometry,
            data_rank=mesh.data_rank,
            training_data=data,
            validation_data=data,
            metrics=metrics,
            save=lambda step: None,
            telemetry=telemetry,
            heartbeat=on_beat,
        ).run(0)
    return [row for row in rows if "train/loss" in row]


def test_no_step_waits_for_the_device(tmp_path: Path) -> None:
    (rows,) = run_ranks(train, 1, tmp_path)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert all(row["time/step"] > 0 for row in rows)
    assert all(0 < row["memory/allocated_gib"] <= row["memory/reserved_gib"] for row in rows)
    json.dumps(rows, allow_nan=False)
