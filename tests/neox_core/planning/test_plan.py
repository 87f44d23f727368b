"""The planner against transformers, real modules, autograd and published figures."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from neox_core.checkpoint.formats.huggingface_config import transformers_config
from neox_core.config import BatchGeometry, ModelConfig, RunConfig, TrainChange, load_config
from neox_core.errors import ConfigError
from neox_core.model import FinalNorm, ModelDimensions, OutputHead, TokenEmbedding, TransformerBlock
from neox_core.planning.activation_checkpointing import layer_modes
from neox_core.planning.activations import block_bytes
from neox_core.planning.memory import Memory, parameter_count, rank_dimensions, stage_layers, stage_memory
from neox_core.planning.plan import flops_per_token, plan
from tests.paths import CONFIGS

NAMES = ("llemma_7b", "llemma_34b", "toy")


def load(name: str, **parallel: int) -> RunConfig:
    config = load_config(CONFIGS / f"{name}.yml")
    return config.model_copy(update={"parallel": config.parallel.model_copy(update=parallel)})


def with_train(config: RunConfig, **changes: Any) -> RunConfig:
    return config.model_copy(update={"train": config.train.model_copy(update=changes)})


def memory_of(config: RunConfig, geometry: BatchGeometry, stage: int) -> Memory:
    return stage_memory(config, geometry, stage, layer_modes(config, geometry, stage, None))


def transformers_model(model: ModelConfig) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(transformers_config(model, sequence_length=8))


@pytest.mark.parametrize("name", [*NAMES, "llama3_8b", "qwen3_8b", "smollm2"])
def test_parameter_count_equals_transformers(name: str) -> None:
    model = load(name).model
    reference = transformers_model(model)
    total = sum(parameter.numel() for parameter in reference.parameters())
    embedding = reference.get_input_embeddings().weight.numel()
    assert parameter_count(model) == total
    # A tied head is multiplied with as any other.
    assert parameter_count(model, input_embedding=False) == total - (0 if model.tied_embeddings else embedding)


@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (8, 1), (8, 4), (4, 5), (16, 1)])
def test_weights_of_a_stage_equal_the_modules_it_holds(tensor: int, pipeline: int) -> None:
    config = load("llemma_34b", tensor=tensor, pipeline=pipeline)
    geometry = geometry_of(data_parallel=3, accumulation_steps=4)
    dims = ModelDimensions.of(config.model, sequence_length=8).shard(tensor)
    assert sum(stage_layers(config, stage) for stage in range(pipeline)) == config.model.num_layers
    for stage in range(pipeline):
        with torch.device("meta"):
            modules: list[torch.nn.Module] = [TransformerBlock(dims) for _ in range(stage_layers(config, stage))]
            modules += [TokenEmbedding(dims)] if stage == 0 else []
            modules += [FinalNorm(dims), OutputHead(dims)] if stage == pipeline - 1 else []
        held = sum(parameter.numel() for module in modules for parameter in module.parameters())
        memory = memory_of(config, geometry, stage)
        assert memory.weights == 2 * held
        assert memory.gradients == 4 * held
        assert memory.master == 4 * -(-held // 3)
        assert memory.optimizer == 2 * memory.master


def geometry_of(data_parallel: int, accumulation_steps: int) -> BatchGeometry:
    return BatchGeometry(data_parallel, data_parallel, 1, accumulation_steps, 1, 1)


def test_1f1b_keeps_as_many_micro_batches_as_there_are_stages_ahead() -> None:
    config = with_train(load("llemma_34b", pipeline=4), activation_checkpointing="none")
    one_layer = block_bytes(config, rank_dimensions(config), "none")
    many, few = geometry_of(8, accumulation_steps=64), geometry_of(8, accumulation_steps=2)
    assert [memory_of(config, many, s).activations // one_layer for s in range(4)] == [48, 36, 24, 12]
    assert [memory_of(config, few, s).activations // one_layer for s in range(4)] == [24, 24, 24, 12]


def test_checkpointing_keeps_less() -> None:
    """By hand for the 7B on one rank: 93 KB, 83 KB and 8 KB per token and layer, and the log-sums."""
    config = load("llemma_7b", tensor=1)
    dims, tokens = rank_dimensions(config), 4 * 4096
    hidden, width = 2 * 4096, 2 * 11008
    assert block_bytes(config, dims, "full") == tokens * hidden
    assert block_bytes(config, dims, "selective") == tokens * (2 * hidden + 3 * hidden + 2 * width)
    assert block_bytes(config, dims, "none") == tokens * (4 * hidden + 4 * hidden + 3 * width + 4 * 32)


@pytest.mark.parametrize(
    ("stage", "vocabulary", "bytes_per_token"),
    [
        pytest.param(1, 2_560_000, 2048 * (2 + 2), id="a chunk of logits, and their gradient"),
        pytest.param(0, 5_120_000, 8192 * (2 + 4), id="the embedding's gradient, and the fp32 copy that is added"),
    ],
)
def test_what_a_large_vocabulary_needs(stage: int, vocabulary: int, bytes_per_token: int) -> None:
    """In bf16, on the last stage and on the first: so much for each further token of the vocabulary."""
    config, geometry = load("llemma_34b", tensor=1, pipeline=2), geometry_of(1, accumulation_steps=1)
    large, more = (
        config.model_copy(update={"model": config.model.model_copy(update={"vocab_size": size})})
        for size in (vocabulary, 2 * vocabulary)
    )
    added = memory_of(more, geometry, stage).working - memory_of(large, geometry, stage).working
    assert added == vocabulary * bytes_per_token


def test_the_fullest_stage_is_found() -> None:
    config = load("llemma_34b", pipeline=4)
    made = plan(config)
    totals = [memory_of(config, made.batch, stage).total for stage in range(4)]
    assert [stage.memory.total for stage in made.stages] == totals
    assert made.memory.total == max(totals) == totals[made.fullest_stage]


def test_fits_or_not() -> None:
    made = plan(load("llemma_34b"))
    need = made.memory.total / 2**30 + 4  # what the plan does not count
    assert plan(load("llemma_34b"), gpu_memory_gib=need + 0.01).spare > 0
    enough, little = (dict(plan(load("llemma_34b"), gpu_memory_gib=size).rows()) for size in (80, 24))
    assert enough["fits 80 GiB less 4 GiB for CUDA and NCCL"].startswith("yes, 49.")
    assert little["fits 24 GiB less 4 GiB for CUDA and NCCL"].startswith("no, 6.")


def measured(layers: int, name: str, micro_batch: int, master: str, tensor: int) -> float:
    """GiB that the plan gives for a benchmark of 65,536 tokens a step."""
    config = with_train(
        load(name, tensor=tensor),
        activation_checkpointing="none",
        micro_batch_size=micro_batch,
        global_batch_tokens=65536,
        master_weights=master,
    )
    config = config.model_copy(update={"model": config.model.model_copy(update={"num_layers": layers})})
    return memory_of(config, geometry_of(1, 16 // micro_batch), 0).total / 2**30


@pytest.mark.parametrize(
    ("name", "layers", "micro_batch", "master", "tensor", "gib"),
    [
        ("llemma_7b", 32, 2, "packed", 1, 133.22),
        ("llemma_7b", 32, 1, "fp32", 1, 129.5),
        ("llemma_34b", 8, 1, "fp32", 1, 109.4),
        ("llemma_34b", 8, 2, "fp32", 1, 117.1),
        ("llemma_7b", 32, 8, "packed", 2, 123.94),
        ("llemma_34b", 8, 4, "packed", 2, 62.86),
        ("llemma_34b", 8, 8, "packed", 2, 80.49),
    ],
)
def test_memory_measured_on_h200s(
    name: str, layers: int, micro_batch: int, master: str, tensor: int, gib: float
) -> None:
    """The peaks in docs/performance.md."""
    assert measured(layers, name, micro_batch, master, tensor) == pytest.approx(gib, rel=0.002)


def test_fp32_parameters_are_their_own_master_weights() -> None:
    """4 bytes of weights, 4 of gradients, 8 of Adam's moments; in bf16 2, 4, 4 of master weights and 8."""
    config, geometry = load("toy", tensor=1), geometry_of(1, 4)
    fp32, bf16 = (memory_of(with_train(config, precision=name), geometry, 0) for name in ("fp32", "bf16"))
    count = parameter_count(config.model)
    assert (fp32.weights, fp32.gradients, fp32.master, fp32.optimizer) == (4 * count, 4 * count, 0, 8 * count)
    assert (bf16.weights, bf16.gradients, bf16.master, bf16.optimizer) == (2 * count, 4 * count, 4 * count, 8 * count)


def test_llemma_fits_its_gpus() -> None:
    """Both ran on A100-40GB; the plan must leave room for the CUDA context and say that one GPU is well used."""
    for name in ("llemma_7b", "llemma_34b"):
        assert 20 * 2**30 < plan(load(name)).memory.total < 38 * 2**30


@pytest.mark.parametrize(
    ("name", "tokens_per_second", "utilisation", "gpu_hours"),
    [("llemma_7b", 2416, 0.36, 23_000), ("llemma_34b", 296, 0.21, 47_000)],
)
def test_published_speed_gives_published_hours(
    name: str, tokens_per_second: float, utilisation: float, gpu_hours: float
) -> None:
    """arXiv 2310.10631: GPU hours and tokens, hence speed, hence utilisation, for the runs as planned."""
    config = load(name)
    reached = tokens_per_second * flops_per_token(config.model, 4096) / 312e12
    assert reached == pytest.approx(utilisation, abs=0.005)
    made = plan(config, utilisation=reached)
    assert made.tokens_per_second_per_gpu == pytest.approx(tokens_per_second)
    assert made.gpu_hours == pytest.approx(gpu_hours, rel=0.02)


def test_flops_by_hand() -> None:
    """Multiply-adds of every matrix product of the toy model, counted one by one."""
    model = load("toy").model
    length, width, kv_width = 256, 256, 64
    per_layer = width * (width + 2 * kv_width) + width * width + 3 * width * 688
    attention = 2 * length * width  # scores over all positions, and their product with the values
    forward = model.num_layers * (per_layer + attention) + width * 2048
    norms = (2 * model.num_layers + 1) * width  # counted by 6·N as if they were products
    assert flops_per_token(model, length) == 3 * 2 * (forward + norms)
    half_attention = model.num_layers * length * width
    assert flops_per_token(model, length, causal=True) == 3 * 2 * (forward + norms - half_attention)


@pytest.mark.parametrize(("name", "accumulation"), [("llemma_7b", 2), ("llemma_34b", 16)])
def test_batch_on_256_gpus(name: str, accumulation: int) -> None:
    made = plan(load(name), nodes=32)
    assert made.batch.tokens == 4_194_304
    assert made.batch.sequences == 1024
    assert made.batch.accumulation_steps == accumulation
    rows = dict(made.rows())
    assert rows["global batch"] == "1,024 sequences = 4,194,304 tokens"
    assert rows["gradient accumulation steps"].startswith(f"{accumulation} of micro batch")


def test_other_node_counts_keep_the_batch_or_say_which_do() -> None:
    assert plan(load("llemma_34b"), nodes=16).batch.accumulation_steps == 32
    made = plan(load("llemma_34b"), nodes=24)
    assert (made.batch.tokens, made.batch.accumulation_steps) == (4_194_304, 22)
    assert dict(made.rows())["gradient accumulation steps"] == (
        "22 on 8 data-parallel ranks, 21 on 16, of micro batch 2: the same batch and its exact mean; GPUs wait 3.0% "
        "of the time"
    )
    all_busy = plan(load("llemma_34b"), nodes=32).step_seconds * 32 / 24
    assert made.step_seconds == pytest.approx(all_busy * 22 * 24 / 512)
    with pytest.raises(ConfigError, match=r"is 512 micro batches of 2, too few for 513 data-parallel ranks on 513"):
        plan(load("llemma_34b"), nodes=513)


def test_rows_are_readable() -> None:
    rows = dict(plan(load("llemma_34b")).rows())
    assert rows["parameters"] == "33,743,970,304"
    assert rows["GPUs"] == "256 = TP 8 x PP 1 x DP 32"
    assert rows["memory per GPU"] == "26.85 GiB"
    assert rows["FLOPs per step"] == "923,663 TFLOP (883,130 TFLOP causal)"
    assert rows["run"] == "12,000 steps = 50.33 billion tokens"
    assert rows["run time"] == "96.37 hours = 24,670 GPU hours"


def test_figures_out_of_range() -> None:
    with pytest.raises(ConfigError, match=r"utilisation 40 is not a share"):
        plan(load("toy"), utilisation=40)
    with pytest.raises(ConfigError, match=r"peak_tflops 0 is not positive"):
        plan(load("toy"), peak_tflops=0)
    with pytest.raises(ConfigError, match=r"gpu_memory_gib -1 is not positive"):
        plan(load("toy"), gpu_memory_gib=-1)


def test_the_largest_batch_needs_the_memory() -> None:
    """More micro batches in flight in a pipeline."""
    small = with_train(load("llemma_34b", pipeline=4), global_batch_tokens=4096 * 16)
    grown = with_train(small, changes=(TrainChange(from_step=9, global_batch_tokens=4096 * 1024),))
    large = with_train(small, global_batch_tokens=4096 * 1024)
    memory = [[stage.memory.total for stage in plan(config).stages] for config in (small, grown, large)]
    assert memory[0][0] < memory[1][0]
    assert memory[1] == memory[2]
    assert plan(grown).batch == plan(small).batch


def test_saves_of_the_34b() -> None:
    """14 bytes a parameter: bf16, fp32 master weights and two moments. Its 80 checkpoints were 38 TB."""
    made = plan(load("llemma_34b"))
    assert made.saves.checkpoint == pytest.approx(14 * made.parameters, rel=0.01)
    assert made.saves.local_disk == 3 * made.saves.checkpoint
    rows = dict(made.rows())
    assert rows["bucket at the end"].startswith(f"{made.saves.count:,} checkpoints = ")
    config = load("llemma_34b")
    few = config.model_copy(update={"checkpoints": config.checkpoints.model_copy(update={"keep_last": 3})})
    assert plan(few).saves.count == 3
    often = few.checkpoints.model_copy(update={"keep_every": 4 * config.train.checkpoint_interval})
    found = plan(few.model_copy(update={"checkpoints": often})).saves.count
    assert found == 3 + config.train.steps // (4 * config.train.checkpoint_interval)
