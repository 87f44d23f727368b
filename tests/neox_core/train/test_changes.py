"""Another learning rate and another batch from a step on, against transformers in a plain torch loop."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from neox_core.checkpoint.conversion.convert import convert
from neox_core.checkpoint.conversion.reference import llama_from_meta
from neox_core.checkpoint.conversion.toy_base import make_random_base
from neox_core.checkpoint.formats.neox import NeoxCheckpoint
from neox_core.config import RunConfig, TrainChange, batch_geometry
from neox_core.data.sampler import micro_batches
from neox_core.data.skipped import first_sequence
from tests.distributed import run_ranks
from tests.neox_core.train.small_training import BATCH, MODELS, SEQUENCE, config_for

STEPS = 9
CHANGES = (
    TrainChange(from_step=4, global_batch_tokens=2 * BATCH * SEQUENCE, lr=4e-3),
    TrainChange(from_step=7, global_batch_tokens=BATCH // 2 * SEQUENCE),
)
SIZES = [BATCH] * 3 + [2 * BATCH] * 3 + [BATCH // 2] * 3
LAYOUTS = [(1, 2, 1), (1, 1, 2)]


def config(*layout: int) -> RunConfig:
    return config_for("gqa", *layout, steps=STEPS, changes=CHANGES)


def sequences(indices: Any) -> np.ndarray:
    """Sequences that count upwards, by their global index."""
    rows = [np.random.default_rng(int(index)).integers(1, 128, size=2) for index in indices]
    return np.stack([(start + (stride % 3 + 1) * np.arange(SEQUENCE + 1)) % 128 for start, stride in rows])


def train_rank(shards: dict[tuple[int, ...], Path]) -> dict[tuple[int, ...], list[tuple[float, float]]]:
    """Loss and gradient norm of each step, per layout."""
    from neox_core.parallel.ranks.mesh import build_mesh, init_distributed
    from neox_core.train.engine.deepspeed_engine import build_engine
    from neox_core.train.loop import pipeline_batches
    from neox_core.train.schedule import learning_rate

    found = {}
    for layout in LAYOUTS:
        run = config(*layout)
        mesh = build_mesh(run.parallel, init_distributed(run.launch))
        engine = build_engine(run, mesh, batch_geometry(run), NeoxCheckpoint(shards[layout]).layer)
        data: Any = SimpleNamespace(sequences=sequences)
        rows = []
        for step in range(1, STEPS + 1):
            geometry, first = batch_geometry(run, step=step), first_sequence(run.train, step)
            engine.set_accumulation_steps(geometry.accumulation_steps)
            engine.set_learning_rate(learning_rate(step, run.train))
            loss = engine.train_batch(pipeline_batches(micro_batches(data, geometry, mesh.data_rank, first)))
            rows.append((float(loss), float(engine.get_global_grad_norm())))
        found[layout] = rows
    return found


def plain_loop(base: Path) -> list[tuple[float, float]]:
    llama = llama_from_meta(base, MODELS["gqa"], SEQUENCE)
    parameters = list(llama.parameters())
    groups = [
        {"params": [p for p in parameters if (p.ndim > 1) is matrix], "weight_decay": 0.1 * matrix}
        for matrix in (True, False)
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    rows, first = [], 0
    for step, size in enumerate(SIZES, start=1):
        peak = config(1, 1, 1).train.optimizer.lr if step < 4 else 4e-3
        cosine = 0.5 * (1 + np.cos(np.pi * (step - 5) / (STEPS - 5)))
        for group in optimizer.param_groups:
            group["lr"] = peak * step / 5 if step <= 5 else peak * (0.033 + (1 - 0.033) * cosine)
        batch = torch.from_numpy(sequences(range(first, first + size)))
        first += size
        loss = torch.nn.functional.cross_entropy(llama(batch[:, :-1]).logits.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        rows.append((float(loss.detach()), float(torch.nn.utils.clip_grad_norm_(parameters, 1.0))))
        optimizer.step()
        optimizer.zero_grad()
    return rows


def test_training_across_changes_equals_a_plain_loop(tmp_path: Path) -> None:
    make_random_base(MODELS["gqa"], tmp_path / "base", seed=7)
    shards = {}
    for layout in LAYOUTS:
        shards[layout] = tmp_path / str(layout)
        convert(tmp_path / "base", shards[layout], MODELS["gqa"], config(*layout).parallel)
    expected = plain_loop(tmp_path / "base")
    assert len({norm for _, norm in expected}) == STEPS
    for rank in run_ranks(train_rank, 2, shards):
        for layout in LAYOUTS:
            np.testing.assert_allclose(rank[layout], expected, rtol=1e-5)


@pytest.mark.parametrize("step", range(1, STEPS + 2))
def test_batches_follow_each_other(step: int) -> None:
    assert first_sequence(config(1, 1, 1).train, step) == sum(SIZES[: step - 1])
