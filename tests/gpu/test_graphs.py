"""A small model's steps through CUDA graphs on one GPU, against steps without; test_layouts.py has several GPUs.

pytest -m gpu tests/gpu
"""

from __future__ import annotations

import gc
import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from neox_core.checkpoint.conversion.convert import convert
from neox_core.checkpoint.conversion.toy_base import make_random_base
from neox_core.checkpoint.formats.neox import NeoxCheckpoint
from neox_core.config import RunConfig, batch_geometry
from neox_core.train.engine.graphs.capture import CudaRecorder
from tests.distributed import run_ranks
from tests.neox_core.train.small_training import MODELS, SEQUENCE, config_for, tokens

STEPS = 6
MODEL = MODELS["gqa"].model_copy(
    update={"hidden_size": 512, "head_dim": 64, "intermediate_size": 1024, "num_kv_heads": 2}
)
TOLERANCE = {"fp32": 1e-5, "bf16": 1e-2}
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def config(graphs: bool, **train: Any) -> RunConfig:
    """With a peak learning rate at which the toy is not chaotic."""
    base = config_for("gqa", 1, 1, 1, cuda_graphs="auto" if graphs else "off", **train)
    optimizer = base.train.optimizer.model_copy(update={"lr": 2e-5})
    return base.model_copy(
        update={
            "model": MODEL,
            "train": base.train.model_copy(update={"optimizer": optimizer}),
            "launch": base.launch.model_copy(update={"device": "cuda"}),
        }
    )


def batches(run: RunConfig, data_rank: int) -> Any:
    """Micro batches of one data-parallel rank; with masks, documents of changing lengths."""
    from neox_core.train.loop import pipeline_batches

    geometry = batch_geometry(run)

    def sequences() -> Any:
        for step in itertools.count(1):
            yield from tokens(step).reshape(-1, geometry.data_parallel, 2, SEQUENCE + 1)[:, data_rank]

    def positions() -> Any:
        for number in itertools.count(5):
            yield np.broadcast_to(np.arange(SEQUENCE) % (3 + number % 17), (2, SEQUENCE)).copy()

    return pipeline_batches(sequences(), positions() if run.train.mask_documents else None)


def train(runs: dict[str, RunConfig], shards: Path) -> dict[str, Any]:
    """One rank: each run's numbers, and whether all that could be replayed was."""
    from neox_core.parallel.ranks.mesh import build_mesh, init_distributed

    device = init_distributed(next(iter(runs.values())).launch)
    return {name: train_once(run, build_mesh(run.parallel, device), shards) for name, run in runs.items()}


def train_once(run: RunConfig, mesh: Any, shards: Path) -> dict[str, Any]:
    from neox_core.train.engine.deepspeed_engine import build_engine
    from neox_core.train.engine.outcome import applied_of

    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    engine = build_engine(run, mesh, batch_geometry(run), NeoxCheckpoint(shards).layer)
    seen: list[float] = []
    engine.observe(None, lambda losses, targets: seen.append(float(losses.sum())))
    data, steps, validations = batches(run, mesh.data_rank), [], []
    accumulation = batch_geometry(run).accumulation_steps
    for step in range(STEPS):
        engine.set_accumulation_steps(accumulation if step < STEPS - 2 else accumulation // 2)
        engine.set_learning_rate(2e-5 * (1 + step))
        steps.append((float(engine.train_batch(data)), float(engine.get_global_grad_norm())))
        validations.append(float(engine.eval_batch(batches(run, mesh.data_rank), num_micro_batches=2)))
    replayed = engine._graphs is not None and engine._graphs._graphs is not None
    peak, reported = torch.cuda.max_memory_allocated() - before, seen[:]
    engine.finish_step()
    weights = {name: p.detach().clone() for name, p in engine.module.named_parameters()}
    if mesh.rank == mesh.world_size - 1:
        next(p for p in engine.module.parameters() if p.ndim > 1).data[0, 0] = math.nan
    engine.train_batch(data)
    engine.finish_step()
    kept = [bool((p == weights[n]).all()) for n, p in engine.module.named_parameters() if bool(p.isfinite().all())]
    applied = bool(applied_of(engine.outcome))
    engine.close()
    return {
        "steps": steps, "validations": validations, "seen": reported, "replayed": replayed, "peak": peak,
        "applied": applied, "kept": all(kept),
    }  # fmt: skip


def close(found: Any, expected: Any, tolerance: float) -> bool:
    return np.allclose(np.array(found), np.array(expected), rtol=tolerance, atol=0)


def run_all(folder: Path, precisions: tuple[str, ...], **settings: Any) -> list[Any]:
    """What was found in each precision, without graphs and with them."""
    runs = {
        f"{precision} {graphs}": config(graphs, precision=precision, **settings)
        for precision in precisions
        for graphs in (False, True)
    }
    make_random_base(MODEL, folder / "base", seed=7)
    convert(folder / "base", folder / "shards", MODEL, config(False).parallel)
    return run_ranks(train, 1, runs, folder / "shards")


def check_equal(ranks: list[dict[str, Any]], precision: str) -> None:
    for found in ranks:
        without, replayed = found[f"{precision} False"], found[f"{precision} True"]
        assert (without["replayed"], replayed["replayed"]) == (False, True)
        for name in ("steps", "validations", "seen"):
            assert len(replayed[name]) == len(without[name])
            assert close(replayed[name], without[name], TOLERANCE[precision]), (name, replayed[name], without[name])
        assert not replayed["applied"]
        assert replayed["kept"]
        # What only one of them holds for a moment is small; a second set of activations would not be.
        assert replayed["peak"] < 1.02 * without["peak"]


@pytest.mark.parametrize(("precision", "mode"), [("bf16", "none"), ("bf16", "selective"), ("fp32", "full")])
def test_modes(precision: str, mode: str, tmp_path: Path) -> None:
    check_equal(run_all(tmp_path, (precision,), activation_checkpointing=mode), precision)


@pytest.mark.parametrize("joined", [True, False])
def test_a_recording_that_fails_leaves_no_memory_behind(joined: bool) -> None:
    """With work on another stream, which CUDA wants joined: else torch would keep the memory pool open."""
    stream, side = torch.cuda.Stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        x = torch.ones(8, device="cuda")
        torch.cuda.synchronize()
        before = torch.cuda.memory_reserved()

        def work() -> None:
            large = torch.ones(1 << 28, device="cuda")
            side.wait_stream(stream)
            with torch.cuda.stream(side):
                large.add_(1)
            raise torch.OutOfMemoryError("as if there were no room")

        recorder = CudaRecorder((lambda: stream.wait_stream(side)) if joined else (lambda: None))
        with pytest.raises(torch.OutOfMemoryError, match="as if there were no room"):
            recorder.record(work)
        gc.collect()
        torch.cuda.empty_cache()
        assert torch.cuda.memory_reserved() <= before
        most = torch.cuda.mem_get_info()[0] - (1 << 30)
        first = torch.empty(most, dtype=torch.uint8, device="cuda")
        del first  # cached, and given back to make room for two of other sizes
        parts = [torch.empty(part, dtype=torch.uint8, device="cuda") for part in (most // 3, most // 2)]
        assert len(parts) == 2
        assert float(x.sum()) == 8
        del parts
        torch.cuda.empty_cache()  # for the processes of other tests


def test_masks_of_documents_change_from_one_replay_to_the_next(tmp_path: Path) -> None:
    settings = {"mask_documents": True, "activation_checkpointing": "none"}
    check_equal(run_all(tmp_path, ("bf16",), **settings), "bf16")
