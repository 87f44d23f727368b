"""Data-parallel ranks with different numbers of micro batches compute the same training as one rank."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from neox_core.checkpoint.conversion.convert import convert
from neox_core.checkpoint.conversion.toy_base import make_random_base
from neox_core.config import RunConfig, batch_geometry
from neox_core.parallel.loss import IGNORE_INDEX
from tests.distributed import run_ranks
from tests.neox_core.train.small_training import MODELS, SEQUENCE, config_for, rank_batches

STEPS = 8
TOLERANCE = {"losses": 1e-6, "validation": 1e-6, "norms": 1e-5}
"""A norm is a sum in fp32 over other parts of the model: layouts of even ranks differ by 3e-6 as well."""
Degrees = tuple[int, int, int]
"""Tensor, pipeline and data parallel."""
CASES: list[tuple[Degrees, int]] = [((1, 1, 3), 8), ((1, 2, 2), 6), ((2, 1, 2), 6)]
"""With so many sequences, in micro batches of 2."""


def config(degrees: Degrees, sequences: int) -> RunConfig:
    return config_for("gqa", *degrees, global_batch_tokens=sequences * SEQUENCE)


def train(run: RunConfig, shards: Path, some_masked: bool, in_products: bool) -> dict[str, list[float]]:
    """Losses, gradient norms, and the losses of validations after each step."""
    from neox_core.checkpoint.formats.neox import NeoxCheckpoint
    from neox_core.parallel.ranks.mesh import build_mesh, init_distributed
    from neox_core.train.engine.deepspeed_engine import accumulate_in_products, build_engine

    mesh, geometry = build_mesh(run.parallel, init_distributed(run.launch)), batch_geometry(run)
    engine = build_engine(run, mesh, geometry, NeoxCheckpoint(shards).layer)
    if in_products:
        accumulate_in_products(engine, geometry)
    count, own = geometry.accumulation_steps, geometry.micro_batches_of(mesh.data_rank)
    engine.set_accumulation_steps(count, own)
    batches, others = (rank_batches(run, mesh.data_rank, first) for first in (1, 100))
    if some_masked:
        batches, others = mask(batches, mesh, run), mask(others, mesh, run)
    found: dict[str, list[float]] = {"losses": [], "norms": [], "validation": []}
    for _ in range(STEPS):
        found["losses"].append(float(engine.train_batch(batches)))
        found["norms"].append(float(engine.get_global_grad_norm()))
        found["validation"].append(float(engine.eval_batch(others, num_micro_batches=count, own=own)))
    return found


def mask(batches: Any, mesh: Any, run: RunConfig) -> Any:
    """Of the k-th micro batch of a global batch, on whatever rank, the first 5 (k modulo 3) targets do not count."""
    geometry = batch_geometry(run)
    while True:
        for k in range(mesh.data_rank, geometry.sequences // geometry.micro_batch_size, geometry.data_parallel):
            inputs, targets = next(batches)
            targets = targets.clone()
            targets[:, : 5 * (k % 3)] = IGNORE_INDEX
            yield inputs, targets


def runs(degrees: Degrees, counts: list[int], shards: Path) -> dict[tuple[int, bool, bool], dict[str, list[float]]]:
    """Each batch size, with and without targets that do not count, and with early gradients."""
    kinds = [(False, False), (True, False), (True, True)]
    return {(n, *kind): train(config(degrees, n), shards, *kind) for n in counts for kind in kinds}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> dict[Degrees, Path]:
    base = tmp_path_factory.mktemp("base")
    make_random_base(MODELS["gqa"], base, seed=7)
    found = {}
    for degrees in ((1, 1, 1), *(degrees for degrees, _ in CASES)):
        found[degrees] = tmp_path_factory.mktemp("shards")
        convert(base, found[degrees], MODELS["gqa"], config(degrees, 8).parallel)
    return found


@pytest.fixture(scope="module")
def expected(shards: dict[Degrees, Path]) -> dict[tuple[int, bool, bool], dict[str, list[float]]]:
    return run_ranks(runs, 1, (1, 1, 1), [6, 8], shards[1, 1, 1])[0]


@pytest.mark.parametrize(("degrees", "sequences"), CASES)
def test_the_mean_is_exact(
    shards: dict[Degrees, Path],
    expected: dict[tuple[int, bool, bool], dict[str, list[float]]],
    degrees: Degrees,
    sequences: int,
) -> None:
    assert batch_geometry(config(degrees, sequences)).busy < 1
    for rank in run_ranks(runs, math.prod(degrees), degrees, [sequences], shards[degrees]):
        for kind, found in rank.items():
            for name, values in found.items():
                np.testing.assert_allclose(values, expected[kind][name], TOLERANCE[name], err_msg=f"{kind} {name}")
