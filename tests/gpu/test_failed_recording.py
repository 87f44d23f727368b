"""A micro batch that one rank alone cannot record, as where memory is short: all go on, and train as they would.

pytest -m multi_gpu tests/gpu/test_failed_recording.py
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from neox_core.checkpoint.conversion.convert import convert
from neox_core.checkpoint.conversion.toy_base import make_random_base
from neox_core.checkpoint.formats.neox import NeoxCheckpoint
from neox_core.config import ParallelConfig, RunConfig, batch_geometry
from tests.distributed import run_ranks
from tests.gpu.several import DEVICE, LEARNING_RATE, MARKS, MODEL, RANKS, STEPS, Layout, Variant, batches

pytestmark = [*MARKS, pytest.mark.skipif(DEVICE != "cuda", reason="graphs are those of GPUs")]
LAYOUT: Layout = (RANKS, 1, 1)
VARIANT = Variant("bf16")
TOLERANCE = {"losses": 1e-3, "norms": 1e-2}
"""Between two trainings of the same kind, whose attention adds up in another order each time."""


def train(failures: list[int | None], shards: Path) -> list[dict[str, Any]]:
    """One rank: what it found in each training. Collective."""
    from neox_core.parallel.ranks.mesh import build_mesh, init_distributed

    run = VARIANT.config(LAYOUT)
    device = init_distributed(run.launch)
    found = [train_once(run, build_mesh(run.parallel, device), shards, fails) for fails in failures]
    dist.destroy_process_group()
    return found


def train_once(run: RunConfig, mesh: Any, shards: Path, fails: int | None) -> dict[str, Any]:
    """Losses, norms, and whether all was recorded. Recording fails on rank 1 at its exchange of that number, from 0."""
    from neox_core.train.engine.deepspeed_engine import build_engine

    assert mesh.exchange is not None
    if mesh.rank == 1 and fails is not None:
        begin, numbers = mesh.exchange._begin, itertools.count()

        def limited(*args: Any) -> Any:
            memory = begin(*args)
            if torch.cuda.is_current_stream_capturing() and next(numbers) == fails:
                raise torch.OutOfMemoryError("as if there were no room")
            return memory

        mesh.exchange._begin = limited
    engine = build_engine(run, mesh, batch_geometry(run), NeoxCheckpoint(shards).layer)
    engine.set_learning_rate(LEARNING_RATE)
    data = batches(run, mesh.data_rank)
    losses, norms = [], []
    for _ in range(STEPS):
        losses.append(float(engine.train_batch(data)))
        norms.append(float(engine.get_global_grad_norm()))
    recorded = engine._graphs is not None and engine._graphs._graphs is not None
    engine.close()
    return {"losses": losses, "norms": norms, "recorded": recorded}


def test_the_other_ranks_replay_what_one_runs(tmp_path: Path) -> None:
    make_random_base(MODEL, tmp_path / "base", seed=7)
    convert(tmp_path / "base", tmp_path / "shards", MODEL, ParallelConfig(tensor=RANKS))
    failures = [None, 0, 1, 2, 5]
    ranks = run_ranks(train, RANKS, failures, tmp_path / "shards")
    expected = ranks[0][0]
    for rank, runs in enumerate(ranks):
        for fails, found in zip(failures, runs, strict=True):
            assert found["recorded"] == (rank != 1 or fails is None)
            for name, tolerance in TOLERANCE.items():
                np.testing.assert_allclose(found[name], expected[name], rtol=tolerance, err_msg=f"{name}, {fails}")
