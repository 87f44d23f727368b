"""What logging every step costs, through the real engine on one GPU (or slowly on a CPU).

    torchrun --nproc_per_node 1 -m benchmarks.telemetry 7b
    torchrun --nproc_per_node 1 -m benchmarks.telemetry tiny --steps 30

The options are those of train_step.py. The last line is JSON: seconds of a step without and with telemetry, in turns,
and the share of a step that telemetry itself says it takes (`time/logging` of the metrics).
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, cast

import torch

from benchmarks.commands import require_ranks
from benchmarks.train_step import checked, parse_options, random_batches, random_weights, report, run_config
from neox_core.config import WandbConfig, batch_geometry
from neox_core.data.mixture import Mixture
from neox_core.parallel.ranks.mesh import build_mesh, init_distributed
from neox_core.planning.calibration import synchronize
from neox_core.train.engine.deepspeed_engine import build_engine
from neox_core.train.engine.outcome import gradient_norm_of
from neox_core.train.observe.metrics import MetricsLog
from neox_core.train.observe.profiler import StepProfiler
from neox_core.train.observe.telemetry import Telemetry

_SOURCES = {f"source-{n}": 1.0 for n in range(5)}


class _NoStore:
    """Stands for an object store that holds nothing yet."""

    def get_text(self, key: str) -> None:
        """Nothing."""


def main() -> None:
    """Run the benchmark and print its figures."""
    options = parse_options()
    require_ranks("benchmarks.telemetry", options.model)
    logging.basicConfig(level=logging.WARNING)
    config = checked(run_config(options, int(os.environ["WORLD_SIZE"])))
    config = config.model_copy(update={"wandb": WandbConfig(mode="offline")})
    device = init_distributed(config.launch)
    mesh, geometry = build_mesh(config.parallel, device), batch_geometry(config)
    engine = build_engine(config, mesh, geometry, random_weights(config, device))
    batches, folder = random_batches(config, mesh), Path(tempfile.mkdtemp())
    with MetricsLog(config, folder, cast(Any, _NoStore()), "", "benchmark", 0) as metrics:
        telemetry = Telemetry(
            config, mesh, geometry, engine, Mixture(_SOURCES), metrics, StepProfiler(None, folder, 0), 1e15
        )
        watched = telemetry.batches(batches)

        def without(step: int) -> None:
            engine.observe(None, None)
            engine.train_batch(batches)

        def with_telemetry(step: int) -> None:
            telemetry.attach()
            telemetry.begin(step, 0)
            loss = engine.train_batch(watched)
            telemetry.end(step, {"train/loss": loss, "train/gradient_norm": gradient_norm_of(engine.outcome)})

        pairs = []
        for step in range(1, options.steps + 1):  # either one first in turn
            runs = (without, with_telemetry) if step % 2 else (with_telemetry, without)
            seconds = {run: _timed(run, step, device) for run in runs}
            pairs.append([seconds[without], seconds[with_telemetry]])
        telemetry.flush()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    _report(pairs[2:], [row["time/logging"] / row["time/step"] for row in rows[2:]])


def _timed(run: Callable[[int], None], step: int, device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    run(step)
    synchronize(device)
    return time.perf_counter() - start


def _report(pairs: list[list[float]], shares: list[float]) -> None:
    result = {
        "seconds_without": median(pair[0] for pair in pairs),
        "seconds_with": median(pair[1] for pair in pairs),
        "cost": median(pair[1] / pair[0] for pair in pairs) - 1,
        "logging_share": median(shares),
    }
    report({name: round(value, 5) for name, value in result.items()})


if __name__ == "__main__":
    main()
