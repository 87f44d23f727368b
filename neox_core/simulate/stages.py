"""One simulated rank of each pipeline stage, each in a process of its own."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from neox_core.config import RunConfig, largest_batch
from neox_core.planning.memory import memory_limit
from neox_core.simulate.rank import RankSimulation, simulate_rank


def simulate(config: RunConfig, nodes: int | None = None, gpu_memory: float | None = None) -> list[RankSimulation]:
    """Build and run one step of the first rank of each pipeline stage.

    A 34B model on 256 ranks takes about a minute.

    Args:
        nodes: number of nodes instead of launch.nodes.
        gpu_memory: bytes of one GPU's memory, which `activation_checkpointing: auto` may fill.

    Raises:
        ConfigError: the nodes don't divide the batch.
    """
    geometry = largest_batch(config, nodes)
    if gpu_memory is not None:
        memory_gib = memory_limit(config, gpu_memory) / 2**30
        config = config.model_copy(update={"train": config.train.model_copy(update={"memory_gib": memory_gib})})
    stages = config.parallel.pipeline
    ranks = [stage * geometry.data_parallel * config.parallel.tensor for stage in range(stages)]
    # Spawned, since process groups and DeepSpeed's state belong to a process.
    processes = ProcessPoolExecutor(
        min(stages, os.cpu_count() or 1), mp_context=get_context("spawn"), max_tasks_per_child=1
    )
    with processes:
        return list(processes.map(_quietly, [config] * stages, [nodes] * stages, ranks))


def _quietly(config: RunConfig, nodes: int | None, rank: int) -> RankSimulation:
    """Without what DeepSpeed prints about memory that is not there."""
    import torch

    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        return simulate_rank(config, nodes, rank)
