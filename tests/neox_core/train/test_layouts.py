"""Every layout computes the same model and the same training as transformers in a plain loop."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from neox_core.checkpoint.convert import convert
from neox_core.checkpoint.neox import NeoxCheckpoint
from neox_core.checkpoint.reference import llama_from_meta
from neox_core.checkpoint.toy_base import make_random_base
from neox_core.config import ModelConfig, ParallelConfig, RunConfig, batch_geometry, load_config
from tests.distributed import run_ranks

STEPS = 20
SEQUENCE = 32
BATCH = 8
CONFIG = load_config(Path(__file__).parents[3] / "configs/toy.yml")
MODELS = {
    "gqa": ModelConfig(
        num_layers=2, hidden_size=64, num_attention_heads=8, num_kv_heads=2, intermediate_size=96, vocab_size=128,
        rope_theta=1e6,
    ),
    "mha": ModelConfig(
        num_layers=2, hidden_size=64, num_attention_heads=4, num_kv_heads=4, intermediate_size=96, vocab_size=128,
        rope_theta=1e4,
    ),
}  # fmt: skip


def config_for(model: str, tensor: int, pipeline: int, data: int, precision: str = "fp32") -> RunConfig:
    train = CONFIG.train.model_copy(
        update={
            "steps": STEPS,
            "sequence_length": SEQUENCE,
            "global_batch_tokens": SEQUENCE * BATCH,
            "micro_batch_size": 2,
            "precision": precision,
            "loss_chunk_tokens": 24,
            "schedule": CONFIG.train.schedule.model_copy(update={"warmup_steps": 5}),
        }
    )
    return CONFIG.model_copy(
        update={
            "model": MODELS[model],
            "train": train,
            "parallel": ParallelConfig(tensor=tensor, pipeline=pipeline),
            "launch": CONFIG.launch.model_copy(update={"ranks_per_node": tensor * pipeline * data}),
        }
    )


def tokens(step: int) -> np.ndarray:
    """The global batch of a step: sequences that count upwards, which a model can learn."""
    generator = np.random.default_rng(step)
    start = generator.integers(0, 128, size=(BATCH, 1))
    stride = generator.integers(1, 4, size=(BATCH, 1))
    return (start + stride * np.arange(SEQUENCE + 1)) % 128


def rank_batches(config: RunConfig, data_rank: int, first_step: int = 1) -> Any:
    """Micro batches of one data-parallel rank, in the order that the sampler defines."""
    from neox_core.train.loop import pipeline_batches

    geometry = batch_geometry(config)

    def sequences() -> Any:
        for step in itertools.count(first_step):
            rows = tokens(step).reshape(geometry.accumulation_steps, geometry.data_parallel, 2, SEQUENCE + 1)
            yield from rows[:, data_rank]

    return pipeline_batches(sequences())


def train_rank(config: RunConfig, shards: Path) -> dict[str, Any]:
    """One rank: logits before training, then the losses and gradient norms of 20 steps."""
    from neox_core.parallel.mesh import build_mesh, init_distributed
    from neox_core.train.engine import build_engine
    from neox_core.train.schedule import learning_rate

    mesh = build_mesh(config.parallel, init_distributed(config.launch))
    engine = build_engine(config, mesh, batch_geometry(config), NeoxCheckpoint(shards).layer)
    _, hidden = engine.eval_batch(rank_batches(config, mesh.data_rank), return_logits=True)
    with torch.no_grad():
        logits = None if hidden is None else engine.module.loss_fn.project(hidden)
    batches = rank_batches(config, mesh.data_rank)
    losses, norms = [], []
    for step in range(1, STEPS + 1):
        for group in engine.optimizer.param_groups:
            group["lr"] = learning_rate(step, config.train)
        losses.append(float(engine.train_batch(batches)))
        norms.append(float(engine.get_global_grad_norm()))
    return {
        "losses": losses,
        "norms": norms,
        "logits": None if logits is None else logits.float().numpy(),
        "place": (mesh.pipeline_rank, mesh.data_rank, mesh.tensor_rank),
    }


def plain_loop(model: str, base: Path) -> dict[str, Any]:
    """The same training with transformers' model and nothing of ours but the weights' file."""
    torch.manual_seed(0)
    config = config_for(model, 1, 1, 1)
    llama = llama_from_meta(base, MODELS[model], SEQUENCE)
    parameters = list(llama.parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
        eps=1e-8,
        lr=1.0,
    )
    ids = torch.from_numpy(tokens(1))[:, :-1]
    with torch.no_grad():
        logits = llama(ids).logits.numpy()
    losses, norms = [], []
    peak, warmup, floor = config.train.optimizer.lr, 5, 0.033
    for step in range(1, STEPS + 1):
        rate = peak * step / warmup
        if step > warmup:
            cosine = 0.5 * (1 + math.cos(math.pi * (step - warmup) / (STEPS - warmup)))
            rate = peak * (floor + (1 - floor) * cosine)
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = torch.from_numpy(tokens(step))
        output = llama(batch[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(output.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(parameters, 1.0)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return {"losses": losses, "norms": norms, "logits": logits}


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, Any]]]:
    """Per model: the folder of its base weights, and what the plain loop makes of them."""
    made = {}
    for name, model in MODELS.items():
        folder = tmp_path_factory.mktemp(f"base-{name}")
        make_random_base(model, folder, seed=7)
        made[name] = folder, plain_loop(name, folder)
    return made


# Data parallelism does not depend on the kind of attention: GQA alone covers it.
LAYOUTS = [("gqa", *layout) for layout in itertools.product((1, 2), repeat=3)]
LAYOUTS += [("mha", *layout, 1) for layout in itertools.product((1, 2), repeat=2)]


@pytest.mark.parametrize(("model", "tensor", "pipeline", "data"), LAYOUTS)
def test_layout_equals_plain_loop(
    references: dict[str, tuple[Path, dict[str, Any]]],
    model: str,
    tensor: int,
    pipeline: int,
    data: int,
    tmp_path: Path,
) -> None:
    folder, expected = references[model]
    config = config_for(model, tensor, pipeline, data)
    convert(folder, tmp_path, config.model, config.parallel)
    ranks = run_ranks(train_rank, tensor * pipeline * data, config, tmp_path)
    for rank in ranks:
        np.testing.assert_allclose(rank["losses"], expected["losses"], rtol=1e-5)
        np.testing.assert_allclose(rank["norms"], expected["norms"], rtol=2e-4)
    # The first data-parallel rank's logits of its last micro batch, put together from tensor-parallel ranks.
    last = sorted((r for r in ranks if r["place"][:2] == (pipeline - 1, 0)), key=lambda r: r["place"][2])
    logits = np.concatenate([rank["logits"] for rank in last], axis=-1)
    rows = slice(BATCH - 2 * data, BATCH - 2 * data + 2)
    np.testing.assert_allclose(logits, expected["logits"][rows], atol=1e-4)
