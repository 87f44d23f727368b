"""Small trainings on all of a node's GPUs, for the tests that are marked `multi_gpu`.

The number of ranks is that of the GPUs, at most 8, or another:

    LLEMMA_TEST_RANKS=4 pytest -m multi_gpu tests/gpu

They share GPUs where there are fewer, and the same code runs on CPUs, through gloo and without graphs, where there are
none (or CUDA_VISIBLE_DEVICES is empty).
"""

from __future__ import annotations

import gc
import itertools
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from neox_core.config import ActivationCheckpointing, ParallelConfig, PipelineSchedule, RunConfig, batch_geometry
from tests.neox_core.train.small_training import MODELS, config_for

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MOST_RANKS = int(os.environ.get("LLEMMA_TEST_RANKS", torch.cuda.device_count()))
RANKS = next((ranks for ranks in (8, 4, 2) if ranks <= MOST_RANKS), 2)
MARKS = [
    pytest.mark.multi_gpu,
    pytest.mark.skipif(MOST_RANKS < 2, reason="needs two GPUs, or LLEMMA_TEST_RANKS"),
]

STEPS, SEQUENCE, BATCH = 4, 32, 16
LEARNING_RATE = 2e-5
"""Small, so that the model is not chaotic: differences stay as small as they begin."""
HEAD_DIM = 64 if DEVICE == "cuda" else 8
MODEL = MODELS["gqa"].model_copy(
    update={
        "num_layers": max(4, RANKS),
        "hidden_size": 8 * HEAD_DIM,
        "head_dim": HEAD_DIM,
        "intermediate_size": 8 * HEAD_DIM,
        "num_kv_heads": 8,
    }
)
Layout = tuple[int, int, int]
"""Degrees of tensor, pipeline and data parallelism."""
LAYOUTS: list[Layout] = [
    (tensor, pipeline, RANKS // (tensor * pipeline))
    for tensor, pipeline in itertools.product((1, 2, 4, 8), repeat=2)
    if tensor * pipeline <= RANKS
]


@dataclass(frozen=True)
class Variant:
    """How a layout is trained."""

    precision: str
    mode: ActivationCheckpointing = "none"
    graphs: bool = True
    overlap: bool = True
    sequence: bool = True
    """Sequence parallelism."""
    kv_heads: int = MODEL.num_kv_heads
    masks: bool = False
    """Attention within documents."""
    schedule: PipelineSchedule = "1f1b"

    @property
    def reference(self) -> Variant:
        """What it has to agree with: the same model, data and precision in the plainest way."""
        return replace(self, mode="none", graphs=False, overlap=False, sequence=True, schedule="1f1b")

    def config(self, layout: Layout) -> RunConfig:
        """Its configuration in a layout."""
        base = config_for(
            "gqa", *layout, precision=self.precision, activation_checkpointing=self.mode, mask_documents=self.masks,
            cuda_graphs="auto" if self.graphs else "off", global_batch_tokens=SEQUENCE * BATCH,
        )  # fmt: skip
        optimizer = base.train.optimizer.model_copy(update={"lr": LEARNING_RATE})
        settings: dict[str, Any] = {"tensor": layout[0], "pipeline": layout[1], "sequence": self.sequence}
        settings |= {"overlap": "auto" if self.overlap else "off", "pipeline_schedule": self.schedule}
        return base.model_copy(
            update={
                "model": MODEL.model_copy(update={"num_kv_heads": self.kv_heads}),
                "train": base.train.model_copy(update={"optimizer": optimizer}),
                "launch": base.launch.model_copy(update={"device": DEVICE}),
                "parallel": ParallelConfig.model_validate(settings),
            }
        )


def batches(run: RunConfig, data_rank: int) -> Any:
    """Micro batches of one data-parallel rank, of learnable sequences; with masks, documents of changing lengths."""
    from neox_core.train.loop import pipeline_batches

    geometry = batch_geometry(run)

    def sequences() -> Iterator[np.ndarray]:
        for step in itertools.count(1):
            start, stride = np.random.default_rng(step).integers(1, 100, size=(2, BATCH, 1))
            rows = (start + stride % 4 * np.arange(SEQUENCE + 1)) % 128
            yield from rows.reshape(-1, geometry.data_parallel, 2, SEQUENCE + 1)[:, data_rank]

    def positions() -> Iterator[np.ndarray]:
        while True:  # of a micro batch, whichever rank has it
            yield np.stack([np.arange(SEQUENCE) % 11, np.arange(SEQUENCE) % 17])

    return pipeline_batches(sequences(), positions() if run.train.mask_documents else None)


def train(layout: Layout, variants: list[Variant], shards: dict[int, Path]) -> dict[Variant, dict[str, Any]]:
    """One rank: what it found in each training. Collective over the layout's ranks."""
    from neox_core.parallel.ranks.mesh import build_mesh, init_distributed

    device = init_distributed(variants[0].config(layout).launch)
    runs = {variant: variant.config(layout) for variant in variants}
    return {
        variant: train_once(run, build_mesh(run.parallel, device), shards[variant.kv_heads])
        for variant, run in runs.items()
    }


def train_once(run: RunConfig, mesh: Any, shards: Path) -> dict[str, Any]:
    """Some steps, a validation, steps of half the batch, and one that a NaN on the last rank spoils."""
    from neox_core.checkpoint.formats.neox import NeoxCheckpoint
    from neox_core.train.engine.deepspeed_engine import build_engine
    from neox_core.train.engine.outcome import applied_of

    gc.collect()
    before = 0
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    engine = build_engine(run, mesh, batch_geometry(run), NeoxCheckpoint(shards).layer)
    micro_batches = batch_geometry(run).accumulation_steps
    data, losses, norms = batches(run, mesh.data_rank), [], []
    for step in range(STEPS):
        engine.set_learning_rate(LEARNING_RATE * (1 + step) / STEPS)
        losses.append(float(engine.train_batch(data)))
        norms.append(float(engine.get_global_grad_norm()))
    losses.append(float(engine.eval_batch(batches(run, mesh.data_rank), num_micro_batches=micro_batches)))
    peak = torch.cuda.max_memory_allocated() - before if DEVICE == "cuda" else 0
    graphs = engine._graphs
    replayed = graphs is not None and graphs._graphs is not None
    engine.set_accumulation_steps(max(1, micro_batches // 2))
    halved = [float(engine.train_batch(data)) for _ in range(3)]
    engine.finish_step()
    weights = {name: p.detach().clone() for name, p in engine.module.named_parameters()}
    if mesh.rank == mesh.world_size - 1:
        *_, matrix = (p for p in engine.module.parameters() if p.ndim > 1)  # of an embedding, not all rows are read
        matrix.data[0, 0] = math.nan
    engine.train_batch(data)
    engine.finish_step()
    finite = [(p, weights[name]) for name, p in engine.module.named_parameters() if bool(p.isfinite().all())]
    found = {
        "losses": losses, "norms": norms, "halved": halved, "replayed": replayed, "peak": peak,
        "applied": bool(applied_of(engine.outcome)),
        "kept": all(bool((p == before).all()) for p, before in finite),
    }  # fmt: skip
    engine.close()
    return found
