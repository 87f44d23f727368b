"""A training of seconds, shared by the tests that run real engines: models, configuration and data."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from neox_core.config import ModelConfig, ParallelConfig, RunConfig, batch_geometry, load_config
from tests.paths import CONFIGS

STEPS = 20
SEQUENCE = 32
BATCH = 8
CONFIG = load_config(CONFIGS / "toy.yml")
MODELS = {
    "gqa": ModelConfig(
        num_layers=2, hidden_size=64, num_attention_heads=8, num_kv_heads=2, intermediate_size=96, vocab_size=128,
        rope_theta=1e6,
    ),
    "mha": ModelConfig(  # an odd number of layers, so that pipeline stages differ
        num_layers=3, hidden_size=64, num_attention_heads=4, num_kv_heads=4, intermediate_size=96, vocab_size=128,
        rope_theta=1e4,
    ),
}  # fmt: skip


def config_for(model: str, tensor: int, pipeline: int, data: int, **train: Any) -> RunConfig:
    """Micro batch 2 on any number of ranks; fp32 unless `train` says otherwise."""
    values = {
        "steps": STEPS,
        "sequence_length": SEQUENCE,
        "global_batch_tokens": SEQUENCE * BATCH,
        "micro_batch_size": 2,
        "precision": "fp32",
        "loss_chunk_tokens": 24,  # less than a micro batch, and no divisor of it
        "schedule": CONFIG.train.schedule.model_copy(update={"warmup_steps": 5}),
    }
    return CONFIG.model_copy(
        update={
            "model": MODELS[model],
            "train": CONFIG.train.model_copy(update=values | train),
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


def rank_batches(
    config: RunConfig, data_rank: int, first_step: int = 1, lengths: Callable[[int], list[list[int]]] | None = None
) -> Any:
    """Micro batches of one data-parallel rank, in the order that the sampler defines.

    Args:
        lengths: of the documents in each sequence of a step, whose positions the micro batches have then.
    """
    from neox_core.train.loop import pipeline_batches

    geometry = batch_geometry(config)

    def dealt(rows_of: Callable[[int], np.ndarray]) -> Iterator[np.ndarray]:
        for step in itertools.count(first_step):
            rows = rows_of(step)[: geometry.sequences]
            yield from rows.reshape(-1, 2, rows.shape[-1])[data_rank :: geometry.data_parallel]

    def positions(step: int) -> np.ndarray:
        assert lengths is not None
        return np.stack([np.concatenate([*map(np.arange, row)]) for row in lengths(step)])

    return pipeline_batches(dealt(tokens), dealt(positions) if lengths else None)
