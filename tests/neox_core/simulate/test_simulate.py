"""256 ranks that are not there: the engine's memory and collectives against the planner's formulas."""

from __future__ import annotations

from typing import Any

import pytest

from flows.cli.planning.memory_tables import memory_table, traffic_table
from neox_core.config import ActivationCheckpointing, RunConfig, load_config
from neox_core.planning.plan import plan
from neox_core.simulate import simulate
from tests.paths import CONFIGS

CONFIG = load_config(CONFIGS / "llemma_34b.yml")
SEQUENCES = 4096 * 2
"""Tokens of a micro batch."""


def changed(layers: int, accumulation: int, pipeline: int, **train: Any) -> RunConfig:
    """The 34B with fewer layers and a smaller batch on 256 ranks."""
    data = 256 // 8 // pipeline
    train = {"global_batch_tokens": SEQUENCES * data * accumulation} | train
    return CONFIG.model_copy(
        update={
            "model": CONFIG.model.model_copy(update={"num_layers": layers}),
            "train": CONFIG.train.model_copy(update=train),
            "parallel": CONFIG.parallel.model_copy(update={"pipeline": pipeline}),
        }
    )


def of(
    name: str, pipeline: int = 1, activation_checkpointing: ActivationCheckpointing = "selective", **model: Any
) -> RunConfig:
    """Another configuration with a few layers."""
    config = load_config(CONFIGS / f"{name}.yml")
    train = {"global_batch_tokens": 8192 * 64, "activation_checkpointing": activation_checkpointing}
    return config.model_copy(
        update={
            "model": config.model.model_copy(update={"num_layers": 2 if pipeline == 1 else 6} | model),
            "train": config.train.model_copy(update=train),
            "parallel": config.parallel.model_copy(update={"pipeline": pipeline}),
        }
    )


def deferring(config: RunConfig) -> RunConfig:
    """Weights' gradients fill the bubble."""
    parallel = config.parallel.model_copy(update={"pipeline_schedule": "zb-h1"})
    return config.model_copy(update={"parallel": parallel})


def with_whole_tokens(config: RunConfig, tensor: int) -> RunConfig:
    """Tensor-parallel ranks have the same hidden states."""
    parallel = config.parallel.model_copy(update={"tensor": tensor, "sequence": False})
    return config.model_copy(update={"parallel": parallel})


def of_length(config: RunConfig, length: int) -> RunConfig:
    """Shorter sequences."""
    return config.model_copy(update={"train": config.train.model_copy(update={"sequence_length": length})})


def in_one_chunk(config: RunConfig) -> RunConfig:
    """The loss of a micro batch at once."""
    return config.model_copy(update={"train": config.train.model_copy(update={"loss_chunk_tokens": 2**20})})


def in_fp32(tensor: int) -> RunConfig:
    config = of_length(of("smollm2", pipeline=2), 1024)
    launch = config.launch.model_copy(update={"ranks_per_node": 4 * tensor})
    return with_whole_tokens(config.model_copy(update={"launch": launch}), tensor)


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(changed(2, 2, pipeline=1, activation_checkpointing="full"), id="TP 8 x DP 32"),
        pytest.param(changed(5, 4, pipeline=4, activation_checkpointing="selective"), id="TP 8 x PP 4 x DP 8"),
        pytest.param(deferring(changed(5, 4, pipeline=4, activation_checkpointing="selective")), id="zb-h1, TP 8"),
        pytest.param(
            deferring(changed(4, 2, pipeline=4, activation_checkpointing="none")), id="zb-h1, fewer than stages"
        ),
        pytest.param(deferring(of("llama3_8b", 2, "none", num_layers=4)), id="zb-h1, TP 1"),
        pytest.param(of("llama3_8b", tied_embeddings=True), id="tied embeddings, on one stage"),
        pytest.param(of("llama3_8b", 2, tied_embeddings=True), id="tied embeddings, on two stages"),
        pytest.param(of("llama3_8b", 2, num_layers=2), id="the first stage's peak is the embedding's gradient"),
        pytest.param(of("qwen3_8b"), id="Qwen 3"),
        pytest.param(of("qwen3_8b", activation_checkpointing="none"), id="Qwen 3, all kept"),
        pytest.param(
            of_length(with_whole_tokens(of("llama3_8b", 2, "full", num_layers=2), 8), 2048),
            id="the first stage's peak is the embedding's gradient, next to tokens that were put together",
        ),
        pytest.param(
            in_one_chunk(of("llama3_8b", 2, num_layers=2, vocab_size=2 * 65_004)),
            id="logits whose rows are not aligned",
        ),
        pytest.param(in_one_chunk(of("llama3_8b", 2, num_layers=2)), id="all logits at once"),
        pytest.param(in_fp32(tensor=1), id="fp32, whose logits are computed again"),
        pytest.param(in_fp32(tensor=3), id="fp32, whose loss is exchanged again"),
        pytest.param(deferring(in_fp32(tensor=3)), id="zb-h1, fp32, whose loss is exchanged once"),
        pytest.param(of("llama3_8b", attention_bias=True), id="biases"),
        pytest.param(of("llama3_8b", family="olmo2"), id="OLMo 2"),
        pytest.param(of("llama3_8b", family="olmo2", activation_checkpointing="none"), id="OLMo 2, all kept"),
        pytest.param(of("llama3_8b", family="olmo2", activation_checkpointing="full"), id="OLMo 2, all computed again"),
        pytest.param(of("llama3_8b", 2, family="smollm3", layers_without_rope=(1, 3)), id="layers without rotation"),
    ],
)
def test_memory_and_collectives_are_the_planners(config: RunConfig) -> None:
    made, simulated = plan(config), simulate(config)
    assert [rank.stage for rank in simulated] == list(range(config.parallel.pipeline))
    for stage, rank in zip(made.stages, simulated, strict=True):
        assert rank.state == pytest.approx(stage.memory.state, rel=0.005)
        assert rank.step_peak == pytest.approx(stage.memory.total, rel=0.005)
        assert rank.step_peak - rank.state == pytest.approx(stage.memory.activations + stage.memory.working, rel=0.02)
        assert rank.state <= rank.start_peak < rank.state + 2**29, "nothing is there twice at the start"
        assert all(rank.collective_calls[key] > 0 for key in stage.traffic)
        assert rank.collective_bytes["all", "all-reduce"] == stage.traffic["all", "all-reduce"]
        for key in rank.collective_bytes.keys() | stage.traffic.keys():
            # DeepSpeed tells others shapes and losses in a few numbers.
            assert rank.collective_bytes.get(key, 0) == pytest.approx(stage.traffic[key], rel=0.005, abs=4096), key
    for table in (memory_table(made, simulated), traffic_table(made, simulated)):
        assert len(table.columns) == 1 + config.parallel.pipeline
