"""Packed documents in every layout: training and evaluation are those of transformers on each document alone."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from neox_core.checkpoint.conversion.convert import convert
from neox_core.checkpoint.conversion.reference import llama_from_meta
from neox_core.checkpoint.conversion.toy_base import make_random_base
from neox_core.checkpoint.formats.neox import NeoxCheckpoint
from neox_core.config import ModelConfig, ParallelConfig, RunConfig, batch_geometry, load_config
from neox_core.data.indexed import IndexedWriter
from tests.distributed import run_ranks
from tests.neox_core.train import plain_training
from tests.paths import CONFIGS

STEPS, SEQUENCE, BATCH = 3, 24, 4
LENGTHS = [[24], [7, 17], [1, 9, 2, 12], [11, 1, 12]]
"""Documents' lengths in each row of a batch."""
MODEL = ModelConfig(
    num_layers=2, hidden_size=64, num_attention_heads=8, num_kv_heads=2, intermediate_size=96, vocab_size=128,
    rope_theta=1e4,
)  # fmt: skip
DOCUMENTS = [list(range(3, 33)), [5, 5], list(range(90, 40, -1)), [127]]
"""Validation text: 83 ids, whose last window is padded."""


def config_for(tensor: int, pipeline: int) -> RunConfig:
    base = load_config(CONFIGS / "toy.yml")
    changes = {
        "steps": STEPS,
        "sequence_length": SEQUENCE,
        "global_batch_tokens": SEQUENCE * BATCH,
        "micro_batch_size": 2,
        "precision": "fp32",
        "mask_documents": True,
        "activation_checkpointing": "full" if pipeline == 1 else "selective",
    }
    return base.model_copy(
        update={
            "model": MODEL,
            "data": base.data.model_copy(update={"eval_sources": ("arxiv",)}),
            "train": base.train.model_copy(update=changes),
            "parallel": ParallelConfig(tensor=tensor, pipeline=pipeline),
            "launch": base.launch.model_copy(update={"ranks_per_node": tensor * pipeline}),
        }
    )


def tokens(step: int) -> np.ndarray:
    return np.random.default_rng(step).integers(0, 128, size=(BATCH, SEQUENCE + 1))


def batches() -> Any:
    from neox_core.train.loop import pipeline_batches

    positions = np.array([[place for length in row for place in range(length)] for row in LENGTHS])
    micro = (half for step in itertools.count(1) for half in np.split(tokens(step), 2))
    return pipeline_batches(micro, itertools.cycle(np.split(positions, 2)))


def train_rank(config: RunConfig, shards: Path, data: Path) -> dict[str, Any]:
    """One rank: logits before training, losses and gradient norms of its steps; without a pipeline, an evaluation."""
    from neox_core.evaluation.perplexity import EvaluateJob, _evaluate
    from neox_core.parallel.ranks.mesh import build_mesh, init_distributed
    from neox_core.train.engine.deepspeed_engine import build_engine

    mesh = build_mesh(config.parallel, init_distributed(config.launch))
    weights = NeoxCheckpoint(shards).layer
    engine = build_engine(config, mesh, batch_geometry(config), weights)
    _, hidden = engine.eval_batch(batches(), return_logits=True)
    with torch.no_grad():
        logits = None if hidden is None else engine.module.loss_fn.project(hidden)
    given, losses, norms = batches(), [], []
    for _ in range(STEPS):
        losses.append(float(engine.train_batch(given)))
        norms.append(float(engine.get_global_grad_norm()))
    evaluation = None
    if config.parallel.pipeline == 1:
        job = EvaluateJob(data, shards, "", (0,), {"arxiv": {"tokens": 83, "bytes": 200}}, data)
        evaluation = _evaluate(config, job, weights, mesh)["sources"]["arxiv"]
    return {
        "losses": losses,
        "norms": norms,
        "logits": None if logits is None else logits.float().numpy(),
        "stage": mesh.pipeline_rank,
        "evaluation": evaluation,
    }


def plain_loop(base: Path) -> dict[str, Any]:
    """Training and evaluation of transformers' model, one document at a time."""
    llama = llama_from_meta(base, MODEL, SEQUENCE)
    optimizer = plain_training.adamw(list(llama.parameters()), config_for(1, 1).train.optimizer.lr)
    evaluation = evaluate_plainly(llama)
    batches = [torch.from_numpy(tokens(step)) for step in range(1, STEPS + 1)]
    with torch.no_grad():
        logits = plain_training.packed_logits(llama, batches[0][:, :-1], LENGTHS).numpy()
    losses, norms = zip(*(plain_training.step(llama, optimizer, batch, LENGTHS) for batch in batches), strict=True)
    return {"losses": losses, "norms": norms, "logits": logits, "evaluation": evaluation}


@torch.no_grad()
def evaluate_plainly(llama: Any) -> float:
    """Mean loss over windows of the text, each cut where documents begin."""
    ids = [token for document in DOCUMENTS for token in document]
    begins = [sum(map(len, DOCUMENTS[:number])) for number in range(len(DOCUMENTS))]
    total = 0.0
    for start in range(0, len(ids) - 1, SEQUENCE):
        inputs = torch.tensor(ids[start : min(start + SEQUENCE, len(ids) - 1)])
        cuts = [0, *(begin - start for begin in begins if 0 < begin - start < len(inputs)), len(inputs)]
        output = plain_training.packed_logits(llama, inputs[None], [np.diff(cuts).tolist()])[0]
        targets = torch.tensor(ids[start + 1 : start + 1 + len(inputs)])
        total += float(torch.nn.functional.cross_entropy(output, targets, reduction="sum"))
    return total / (len(ids) - 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("masked")
    make_random_base(MODEL, made / "base", seed=7)
    with IndexedWriter(made / "data" / "arxiv" / "validation", np.dtype("<u2")) as writer:
        for document in DOCUMENTS:
            writer.add_document(document)
    return made


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, Any]:
    return plain_loop(folder / "base")


@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_packed_documents_in_every_layout(
    folder: Path, expected: dict[str, Any], tensor: int, pipeline: int, tmp_path: Path
) -> None:
    config = config_for(tensor, pipeline)
    convert(folder / "base", tmp_path, MODEL, config.parallel)
    ranks = run_ranks(train_rank, tensor * pipeline, config, tmp_path, folder / "data")
    for rank in ranks:
        np.testing.assert_allclose(rank["losses"], expected["losses"], rtol=1e-5)
        np.testing.assert_allclose(rank["norms"], expected["norms"], rtol=1e-5)
        if pipeline == 1:
            assert rank["evaluation"]["tokens"] == 82
            np.testing.assert_allclose(rank["evaluation"]["loss"], expected["evaluation"], rtol=1e-5)
    logits = np.concatenate([rank["logits"] for rank in ranks if rank["stage"] == pipeline - 1], axis=-1)
    np.testing.assert_allclose(logits, expected["logits"][2:], atol=1e-4)
