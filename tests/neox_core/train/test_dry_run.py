"""The step on zeros: it leaves no trace, and says what to do where memory is short."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from neox_core.checkpoint.conversion.convert import convert
from neox_core.checkpoint.conversion.toy_base import make_random_base
from neox_core.config import RunConfig, batch_geometry
from neox_core.errors import LaunchError
from neox_core.train.dry_run import memory_explained
from tests.distributed import run_ranks
from tests.neox_core.train.small_training import MODELS, config_for, rank_batches

STEPS = 3
PRECISIONS = ("bf16", "fp32")


def config(precision: str) -> RunConfig:
    """Two pipeline stages, which exchange shapes at their first step; 4 accumulation steps."""
    return config_for("gqa", 1, 2, 1, precision=precision, master_weights="packed", mask_documents=False)


def train_once(config: RunConfig, mesh: Any, shards: Path, rehearsed: bool) -> dict[str, Any]:
    """Losses and gradient norms of some steps, and the weights after them."""
    from neox_core.checkpoint.formats.neox import NeoxCheckpoint
    from neox_core.train.dry_run import dry_run, zero_weights
    from neox_core.train.engine.deepspeed_engine import build_engine

    weights, geometry = NeoxCheckpoint(shards).layer, batch_geometry(config)
    engine = build_engine(config, mesh, geometry, zero_weights(config) if rehearsed else weights)
    if rehearsed:
        before = torch.get_rng_state()
        dry_run(engine, config, geometry, mesh)
        assert torch.equal(torch.get_rng_state(), before)
        assert engine.micro_batches == geometry.accumulation_steps
        engine.load_weights(weights)
    batches = rank_batches(config, mesh.data_rank)
    losses, norms = [], []
    for _ in range(STEPS):
        losses.append(float(engine.train_batch(batches)))
        norms.append(float(engine.get_global_grad_norm()))
    state = engine.optimizer.state_dict()
    return {
        "losses": losses,
        "norms": norms,
        "weights": [p.detach().float().clone() for p in engine.module.parameters()],
        "masters": [master.to_host() for master in state["single_partition_of_fp32_groups"]],
        "counts": (engine.global_steps, engine.global_samples, engine.micro_steps),
    }


def train_rank(shards: Path) -> dict[Any, Any]:
    from neox_core.parallel.ranks.mesh import build_mesh, init_distributed

    mesh = build_mesh(config("bf16").parallel, init_distributed(config("bf16").launch))
    return {
        (precision, rehearsed): train_once(config(precision), mesh, shards, rehearsed)
        for precision in PRECISIONS
        for rehearsed in (False, True)
    }


def test_training_is_the_same_bit_for_bit_with_and_without(tmp_path: Path) -> None:
    make_random_base(MODELS["gqa"], tmp_path / "base", seed=7)
    convert(tmp_path / "base", tmp_path / "shards", MODELS["gqa"], config("bf16").parallel)
    for rank in run_ranks(train_rank, 2, tmp_path / "shards"):
        for precision in PRECISIONS:
            plain, rehearsed = rank[precision, False], rank[precision, True]
            assert plain["losses"] == rehearsed["losses"]
            assert plain["norms"] == rehearsed["norms"]
            assert plain["counts"] == rehearsed["counts"]
            assert len(set(plain["losses"])) == STEPS
            for what in ("weights", "masters"):
                assert all(map(torch.equal, plain[what], rehearsed[what])), what


def out_of_memory(**train: Any) -> str:
    run = config_for("gqa", 1, 1, 1, **train)
    mesh = cast(Any, SimpleNamespace(rank=3, device=torch.device("cpu"), pipeline_rank=0))
    with pytest.raises(LaunchError) as caught, memory_explained(run, batch_geometry(run), mesh):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")
    return str(caught.value)


def test_out_of_memory_says_what_was_planned_and_what_to_change() -> None:
    text = out_of_memory(precision="bf16", activation_checkpointing="none")
    assert text.startswith("rank 3 is out of memory on cpu. Planned for it, in GiB: weights 0.0, gradients 0.0, ")
    assert "Set train.activation_checkpointing: full (it is none); or lower train.micro_batch_size (it is 2); " in text
    assert "set train.master_weights: packed (it is fp32); or raise parallel.tensor (1)" in text
    assert "(CUDA out of memory. Tried to allocate 2.00 GiB.)" in text
    assert "\n" not in text


def test_advice_leaves_out_what_is_done_already() -> None:
    text = out_of_memory(precision="bf16", activation_checkpointing="full", master_weights="packed")
    assert "activation_checkpointing:" not in text
    assert "packed" not in text
    assert "Lower train.micro_batch_size (it is 2); or raise" in text


def test_other_errors_pass() -> None:
    run = config_for("gqa", 1, 1, 1)
    with pytest.raises(ValueError, match="no more"), memory_explained(run, batch_geometry(run), cast(Any, None)):
        raise ValueError("no more")
