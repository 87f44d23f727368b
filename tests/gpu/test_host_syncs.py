"""Steps of the real loop on a GPU, in which the host may not wait for the device."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from neox_core.config import ValidationConfig
from tests.distributed import run_ranks
from tests.neox_core.train.small_loop import run_loop
from tests.neox_core.train.small_training import config_for

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
STEPS = 6


def train(folder: Path) -> list[dict[str, float]]:
    """The rows of a training whose steps from the second on raise an error where the host waits."""
    from neox_core.train.dry_run import zero_weights

    settings: dict[str, Any] = {"steps": STEPS, "precision": "bf16", "checkpoint_interval": 100}
    config = config_for("gqa", 1, 1, 1, validation=ValidationConfig(interval=100, iterations=1), **settings)
    config = config.model_copy(update={"launch": config.launch.model_copy(update={"device": "cuda"})})

    def on_place(place: str) -> None:
        watched = place.startswith("step ") and 2 <= int(place.split()[1]) < STEPS
        torch.cuda.set_sync_debug_mode("error" if watched else "default")

    return run_loop(config, zero_weights(config), folder, on_place)


def test_no_step_waits_for_the_device(tmp_path: Path) -> None:
    (rows,) = run_ranks(train, 1, tmp_path)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert all(row["time/step"] > 0 for row in rows)
    assert all(0 < row["memory/allocated_gib"] <= row["memory/reserved_gib"] for row in rows)
    json.dumps(rows, allow_nan=False)
