"""The real loop around a real engine and made-up data, with what it logs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from neox_core.config import RunConfig, batch_geometry
from neox_core.data.mixture import Mixture
from tests.neox_core.train.small_training import SEQUENCE

WEIGHTS = {"arxiv": 0.5, "code": 0.25, "web": 0.25, "unused": 0.0}


def sequences(indices: Any) -> np.ndarray:
    """Sequences that each source's ids tell apart from the others'."""
    sources, _ = Mixture(WEIGHTS).locate(np.asarray(indices))
    rows = [np.random.default_rng(int(index)).integers(0, 128, SEQUENCE + 1) for index in indices]
    return np.stack([(row // (1 + 2 * source)).astype(np.int64) for row, source in zip(rows, sources, strict=True)])


def never(incident: Any) -> Any:
    """What a guard must not do."""
    raise AssertionError(incident)


def run_loop(
    config: RunConfig,
    weights: Callable[[int, int], Any],
    folder: Path,
    on_place: Callable[[str], None] = lambda place: None,
) -> list[dict[str, float]]:
    """Train on one rank; the rows of the training that it logged.

    Args:
        weights: as build_engine takes them.
        folder: for profiles.
        on_place: called with what begins, such as 'step 3'.
    """
    from neox_core.parallel.ranks.mesh import build_mesh, init_distributed
    from neox_core.train.engine.deepspeed_engine import build_engine
    from neox_core.train.guards import Guard
    from neox_core.train.loop import Loop
    from neox_core.train.observe.profiler import StepProfiler
    from neox_core.train.observe.telemetry import Telemetry
    from neox_core.train.resuming.train_checkpoints import TrainingState

    mesh = build_mesh(config.parallel, init_distributed(config.launch))
    geometry = batch_geometry(config)
    engine = build_engine(config, mesh, geometry, weights)
    rows: list[dict[str, float]] = []
    metrics: Any = SimpleNamespace(log=lambda step, **values: rows.append({"step": step, **values}))
    data: Any = SimpleNamespace(mixture=Mixture(WEIGHTS), sequences=sequences)
    profiler = StepProfiler(config.train.profile, folder, mesh.rank)
    with Telemetry(config, mesh, geometry, engine, data.mixture, metrics, profiler, 1e12) as telemetry:
        Loop(
            engine=engine,
            train=config.train,
            geometry=partial(batch_geometry, config, None),
            data_rank=mesh.data_rank,
            validation_data=data,
            metrics=metrics,
            guard=Guard(config.train.guard, engine.set_loss_limit, never),
            save=lambda state, upload: None,
            stop_due=lambda: None,
            go_back=never,
            telemetry=telemetry,
            heartbeat=on_place,
        ).run(TrainingState(0, data))
    return [row for row in rows if "train/loss" in row]
