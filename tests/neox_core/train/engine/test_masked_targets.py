"""Each token that counts has the same weight, in whatever micro batch and on whatever rank it is."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from neox_core.checkpoint.conversion.convert import convert
from neox_core.checkpoint.conversion.reference import llama_from_meta
from neox_core.checkpoint.conversion.toy_base import make_random_base
from neox_core.checkpoint.formats.neox import NeoxCheckpoint
from neox_core.config import RunConfig, batch_geometry
from neox_core.parallel.loss import IGNORE_INDEX
from tests.distributed import run_ranks
from tests.neox_core.train.small_training import BATCH, MODELS, SEQUENCE, config_for, tokens

STEPS, Z_LOSS = 4, 0.02
LAYOUTS = [(2, 1, 1), (1, 2, 1), (1, 1, 2)]
COUNTED = [
    [SEQUENCE, 5, 0, 0, 1, SEQUENCE, 7, 12],
    [0, 0, 0, 0, 0, 0, 3, 0],
    [0] * BATCH,  # nothing to learn from: no update but by momentum and decay
    [SEQUENCE] * BATCH,
]
"""Positions that count, at the end of each sequence of each step."""


def masked(step: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets [8,T] of a step's global batch."""
    ids = torch.from_numpy(tokens(step))
    counts = torch.tensor(COUNTED[step - 1])[:, None]
    return ids[:, :-1], ids[:, 1:].masked_fill(torch.arange(SEQUENCE) < SEQUENCE - counts, IGNORE_INDEX)


def rank_batches(config: RunConfig, data_rank: int) -> Any:
    geometry = batch_geometry(config)
    for step in itertools.count(1):
        inputs, targets = (
            x.reshape(geometry.accumulation_steps, geometry.data_parallel, 2, SEQUENCE)[:, data_rank]
            for x in masked(step)
        )
        yield from zip(inputs, targets, strict=True)


def train_all(configs: dict[Any, RunConfig], shards: dict[Any, Path]) -> dict[Any, Any]:
    """One rank: per layout, the loss before training, and losses and gradient norms of the steps."""
    from neox_core.parallel.ranks.mesh import build_mesh, init_distributed
    from neox_core.train.engine.deepspeed_engine import build_engine

    device = init_distributed(next(iter(configs.values())).launch)
    found = {}
    for layout, config in configs.items():
        mesh = build_mesh(config.parallel, device)
        engine = build_engine(config, mesh, batch_geometry(config), NeoxCheckpoint(shards[layout]).layer)
        validation = float(engine.eval_batch(rank_batches(config, mesh.data_rank)))
        batches, steps = rank_batches(config, mesh.data_rank), []
        for _ in range(STEPS):
            steps.append((float(engine.train_batch(batches)), float(engine.get_global_grad_norm())))
        found[layout] = validation, steps
    return found


def plain_loop(base: Path, config: RunConfig) -> tuple[float, list[tuple[float, float]]]:
    """The same with transformers' model and autograd; the loss is reported without the z-loss."""
    llama = llama_from_meta(base, MODELS["gqa"], SEQUENCE)
    groups = [
        {"params": [p for p in llama.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in llama.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=config.train.optimizer.lr, betas=(0.9, 0.95), eps=1e-8)
    steps = []
    for step in range(1, STEPS + 1):
        inputs, targets = masked(step)
        logits, counts = llama(inputs).logits, targets != IGNORE_INDEX
        count = max(1, int(counts.sum()))
        loss = (
            F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum") / count
        )
        (loss + Z_LOSS * logits.logsumexp(-1)[counts].square().sum() / count).backward()
        norm = torch.nn.utils.clip_grad_norm_(llama.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        steps.append((float(loss.detach()), float(norm)))
    return steps[0][0], steps


def test_ragged_masks(tmp_path: Path) -> None:
    make_random_base(MODELS["gqa"], tmp_path / "base", seed=7)
    configs = {layout: config_for("gqa", *layout, z_loss=Z_LOSS) for layout in LAYOUTS}
    shards = {layout: tmp_path / "-".join(map(str, layout)) for layout in LAYOUTS}
    for layout, config in configs.items():
        convert(tmp_path / "base", shards[layout], MODELS["gqa"], config.parallel)
    validation, steps = plain_loop(tmp_path / "base", configs[LAYOUTS[0]])
    assert steps[2] == (0.0, 0.0)
    for rank in run_ranks(train_all, 2, configs, shards):
        for layout in LAYOUTS:
            found_validation, found_steps = rank[layout]
            assert found_validation == pytest.approx(validation, rel=1e-5)
            np.testing.assert_allclose(found_steps, steps, rtol=1e-5, err_msg=str(layout))
