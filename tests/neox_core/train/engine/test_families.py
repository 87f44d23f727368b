"""Every family trains like transformers' own class of it in a plain loop."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from neox_core.checkpoint.conversion.convert import convert, open_source
from neox_core.checkpoint.formats.neox import NeoxCheckpoint
from neox_core.config import ParallelConfig, RunConfig, batch_geometry
from tests.distributed import run_ranks
from tests.neox_core.checkpoint.conversion.test_families import CASES, write_model
from tests.neox_core.train import plain_training
from tests.neox_core.train.small_training import STEPS, config_for, rank_batches, tokens

LAYOUTS = [(1, 1, 1), (2, 1, 1), (1, 2, 1), (2, 2, 1), (1, 1, 2)]
IN_PRODUCTS = [(1, 1, 1), (2, 2, 1)]
TRAINED = [
    "llama 3:1",
    "llama tied",
    "llama with biases",
    "mistral",
    "qwen2",
    "qwen3",
    "qwen3 3:1",
    "olmo2 3:1",
    "smollm3",
]
SHARING = ["llama with biases", "qwen2", "qwen3", "olmo2", "olmo2 with biases"]
RATE = 1e-3


def train_rank(runs: list[tuple[RunConfig, Path]], in_products: bool) -> list[dict[str, Any]]:
    """One rank's losses and gradient norms in each training; its gradients by autograd or added by the products."""
    return [_train(config, shards, in_products) for config, shards in runs]


def _train(config: RunConfig, shards: Path, in_products: bool) -> dict[str, Any]:
    from neox_core.parallel.ranks.mesh import build_mesh, init_distributed
    from neox_core.train.engine.deepspeed_engine import accumulate_in_products, build_engine

    mesh = build_mesh(config.parallel, init_distributed(config.launch))
    engine = build_engine(config, mesh, batch_geometry(config), NeoxCheckpoint(shards).layer)
    if in_products:
        accumulate_in_products(engine, batch_geometry(config))
    batches = rank_batches(config, mesh.data_rank)
    losses, norms = [], []
    for _ in range(STEPS):
        for group in engine.optimizer.param_groups:
            group["lr"] = RATE
        losses.append(float(engine.train_batch(batches)))
        norms.append(float(engine.get_global_grad_norm()))
    return {"losses": losses, "norms": norms}


def plain_loop(folder: Path) -> dict[str, Any]:
    """The same training with transformers' model and nothing of ours but the weights' file."""
    batches = ((torch.from_numpy(tokens(step)), None) for step in range(1, STEPS + 1))
    losses, norms = zip(*plain_training.train(folder, RATE, batches), strict=True)
    return {"losses": losses, "norms": norms}


Bases = dict[str, tuple[Path, dict[str, Any]]]
"""A base by its name, and what a plain loop makes of it."""


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    """Every family's."""
    return {case: made(tmp_path_factory.mktemp("base"), **CASES[case]) for case in TRAINED}


def made(folder: Path, **changes: Any) -> tuple[Path, dict[str, Any]]:
    write_model(folder, **changes)
    return folder, plain_loop(folder)


def compare(layout: tuple[int, int, int], bases: Bases, folder: Path, in_products: bool) -> None:
    """All ranks' losses and norms with those of the plain loops."""
    runs = []
    for case, (base, _) in bases.items():
        model, shards = open_source(base).model, folder / case
        config = config_for("gqa", *layout, activation_checkpointing="selective").model_copy(update={"model": model})
        convert(base, shards, model, ParallelConfig(tensor=layout[0], pipeline=layout[1]))
        runs.append((config, shards))
    for rank in run_ranks(train_rank, math.prod(layout), runs, in_products):
        for (case, (_, expected)), found in zip(bases.items(), rank, strict=True):
            np.testing.assert_allclose(found["losses"], expected["losses"], rtol=1e-5, err_msg=case)
            np.testing.assert_allclose(found["norms"], expected["norms"], rtol=1e-5, err_msg=case)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_equals_a_plain_loop(layout: tuple[int, int, int], bases: Bases, tmp_path: Path) -> None:
    compare(layout, bases, tmp_path, layout in IN_PRODUCTS)


@pytest.mark.parametrize("in_products", [False, True], ids=["by autograd", "in products"])
def test_ranks_that_share_kv_heads_train_as_a_plain_loop(in_products: bool, tmp_path: Path) -> None:
    """Two have the same rows of keys and values, with their biases and scales."""
    bases = {case: made(tmp_path / f"{case} base", **CASES[case], num_key_value_heads=2) for case in SHARING}
    compare((4, 1, 1), bases, tmp_path, in_products)
