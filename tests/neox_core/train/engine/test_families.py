"""Every family trains like transformers' own class of it in a plain loop."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from neox_core.checkpoint.conversion.convert import convert, open_source
from neox_core.checkpoint.conversion.reference import open_reference, whole_llama
from neox_core.checkpoint.formats.neox import NeoxCheckpoint
from neox_core.config import ParallelConfig, RunConfig, batch_geometry
from tests.distributed import run_ranks
from tests.neox_core.checkpoint.conversion.test_families import CASES, write_model
from tests.neox_core.train import plain_training
from tests.neox_core.train.small_training import SEQUENCE, STEPS, config_for, rank_batches, tokens

LAYOUTS = [(1, 1, 1), (2, 2, 1)]
TRAINED = ["llama 3:1", "mistral", "qwen2", "qwen3", "qwen3 3:1"]
RATE = 1e-3


def train_rank(config: RunConfig, shards: Path, in_products: bool) -> dict[str, Any]:
    """One rank's losses and gradient norms."""
    from neox_core.parallel.mesh import build_mesh, init_distributed
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
    model = whole_llama(open_reference(folder, SEQUENCE, torch.float32))
    parameters = [p.requires_grad_() for p in model.parameters()]
    optimizer = plain_training.adamw(parameters, RATE)
    losses, norms = [], []
    for step in range(1, STEPS + 1):
        loss, norm = plain_training.step(model, optimizer, torch.from_numpy(tokens(step)))
        losses.append(loss)
        norms.append(norm)
    return {"losses": losses, "norms": norms}


@pytest.mark.parametrize("case", TRAINED)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_equals_a_plain_loop(case: str, layout: tuple[int, int, int], tmp_path: Path) -> None:
    write_model(tmp_path / "base", **CASES[case])
    model = open_source(tmp_path / "base").model
    config = config_for("gqa", *layout, activation_checkpointing="selective").model_copy(update={"model": model})
    convert(tmp_path / "base", tmp_path / "neox", model, ParallelConfig(tensor=layout[0], pipeline=layout[1]))
    expected = plain_loop(tmp_path / "base")
    for in_products in (False, True):
        for rank in run_ranks(train_rank, math.prod(layout), config, tmp_path / "neox", in_products):
            np.testing.assert_allclose(rank["losses"], expected["losses"], rtol=1e-5)
            np.testing.assert_allclose(rank["norms"], expected["norms"], rtol=1e-5)
