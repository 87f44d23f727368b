r"""A training step in both schedules of pipeline stages, turn by turn in one run, with the same weights and batches.

    torchrun --nproc_per_node 2 -m benchmarks.pipeline_schedules 7b --layers 8 --pp 2
    torchrun --nproc_per_node 2 -m benchmarks.pipeline_schedules tiny --layers 8 --pp 2 --tokens 1024 \
        --sequence-length 512

The second one runs on two CPU cores. Options are those of benchmarks.train_step; each GPU holds two engines. Seconds
are medians. `paper` is the ratio where a micro batch's forward pass, inputs' gradients and weights' gradients take the
same time (arXiv 2401.10241). Losses differ, relatively, by what attention's backward pass on GPUs adds up in another
order each time; on CPUs they are equal. The last line is JSON.
"""

from __future__ import annotations

import logging
import os
import statistics
import sys
from typing import Any

import torch.distributed as dist

from benchmarks.commands import require_ranks
from benchmarks.train_step import checked, parse_options, random_batches, random_weights, report, run_config, timed_step
from neox_core.config import PipelineSchedule, RunConfig, batch_geometry
from neox_core.parallel.ranks.mesh import Mesh, build_mesh, init_distributed
from neox_core.planning.search import SCHEDULES
from neox_core.planning.step_time import times_filled
from neox_core.train.engine.deepspeed_engine import accumulate_in_products, build_engine

_FIRST_STEPS = 2
"""Not counted: they compile and record."""


def main() -> None:
    """Run the benchmark and print its figures."""
    options = parse_options()
    require_ranks("benchmarks.pipeline_schedules", options.model)
    if options.pp == 1:
        sys.exit("one stage waits for nobody: say --pp 2 or more")
    logging.basicConfig(level=logging.WARNING)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    config = checked(run_config(options, int(os.environ["WORLD_SIZE"])))
    device = init_distributed(config.launch)
    mesh = build_mesh(config.parallel, device)
    engines = {schedule: _engine(config, schedule, mesh) for schedule in SCHEDULES}
    batches = {schedule: random_batches(config, mesh) for schedule in SCHEDULES}
    seconds: dict[str, list[float]] = {schedule: [] for schedule in SCHEDULES}
    losses: dict[str, list[float]] = {schedule: [] for schedule in SCHEDULES}
    for _ in range(options.steps):
        for schedule, engine in engines.items():
            seconds[schedule].append(timed_step(engine, batches[schedule], device)[0])
            losses[schedule].append(float(engine.agg_train_loss))
    if mesh.rank == 0:
        plain, filled = (statistics.median(seconds[schedule][_FIRST_STEPS:]) for schedule in SCHEDULES)
        count = batch_geometry(config).accumulation_steps
        whole = count + options.pp - 1  # a step in 1F1B, in micro batches
        report(
            {
                "micro_batches": count,
                **{f"{schedule}_seconds": round(t, 4) for schedule, t in zip(SCHEDULES, (plain, filled), strict=True)},
                "ratio": round(plain / filled, 4),
                "paper": round(whole / (whole - times_filled(options.pp, count) / 3), 4),
                "largest_loss_difference": max(map(_difference, losses["1f1b"], losses["zb-h1"])),
            }
        )
    sys.stdout.flush()
    for engine in engines.values():
        engine.close()
    dist.destroy_process_group()


def _difference(one: float, other: float) -> float:
    return abs(one - other) / other


def _engine(config: RunConfig, schedule: PipelineSchedule, mesh: Mesh) -> Any:
    parallel = config.parallel.model_copy(update={"pipeline_schedule": schedule})
    config = config.model_copy(update={"parallel": parallel})
    geometry = batch_geometry(config)
    engine = build_engine(config, mesh, geometry, random_weights(config, mesh.device))
    accumulate_in_products(engine, geometry)  # on CPUs too, so that the schedules differ in nothing else
    engine.set_learning_rate(1e-4)
    return engine


if __name__ == "__main__":
    main()
