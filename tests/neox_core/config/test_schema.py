"""What a configuration may say, how batches are cut, and the facts in configs/."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from neox_core import config as schema
from neox_core.config import RunConfig, batch_geometry, batch_tokens, load_config, sequences_before
from neox_core.errors import ConfigError
from tests.paths import CONFIGS


def toy(tmp_path: Path, extra: str) -> RunConfig:
    path = tmp_path / "run.yml"
    path.write_text(f"include: {CONFIGS / 'toy.yml'}\n{extra}\n")
    return load_config(path)


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        (
            "parallel: {tensor: 3}",
            r"parallel.tensor 3 does not divide model.num_attention_heads 8: use one of \[1, 2\]",
        ),
        (
            "model: {num_attention_heads: 12, num_kv_heads: 6, hidden_size: 192}\nparallel: {tensor: 4}",
            "parallel.tensor 4 neither divides model.num_kv_heads 6 nor is a multiple of it",
        ),
        ("model: {rope_scaling: {rope_type: llama3, factor: 8}}", "llama3 needs low_freq_factor.*; llama3 has none"),
        (
            "model: {rope_scaling: {rope_type: linear, factor: 8, low_freq_factor: 1}}",
            r"linear needs no more; linear has low_freq_factor",
        ),
        (
            "model: {rope_scaling: {rope_type: yarn, factor: 8}}",
            "yarn needs original_max_position_embeddings.*; yarn has none",
        ),
        (
            "model: {rope_theta: 1, rope_scaling: {rope_type: yarn, factor: 8, original_max_position_embeddings: 9}}",
            r"yarn needs a rope_theta above 1, not 1\.0",
        ),
        (
            "data: {input: 's3://text/proof-pile'}",
            "data.input s3://text/proof-pile: such places are in the storage section's store, but .* is embedded",
        ),
        (
            "base_model: {path: 's3://b/base'}\ndata: {sources: {code: {files: {train: 's3://b/*.jsonl'}}}}",
            r"base_model.path s3://b/base and data.sources.code.files.train s3://b/\*.jsonl: such places",
        ),
        ("model: {unpadded_vocab_size: 2049}", "unpadded_vocab_size 2049 exceeds vocab_size 2048"),
        ("model: {intermediate_size: 687}", "parallel.tensor 2 does not divide model.intermediate_size 687"),
        ("model: {vocab_size: 2047}", "parallel.tensor 2 does not divide model.vocab_size 2047"),
        (
            "train: {sequence_length: 255, global_batch_tokens: 4080}",
            "sequence_length 255 is not divisible by parallel.tensor 2, .* or set parallel.sequence to false",
        ),
        (
            "model: {family: mistral, sliding_window: 255}",
            "sequence_length 256 exceeds model.sliding_window 255: attention here is full",
        ),
        ("model: {layers_without_rope: [1]}", r"layers_without_rope \[1\] is not computed for the family llama"),
        ("model: {family: smollm3, layers_without_rope: [3, 1]}", r"layers_without_rope \[3, 1\] must ascend, up to 3"),
        ("model: {family: smollm3, layers_without_rope: [4]}", r"layers_without_rope \[4\] must ascend, up to 3"),
        ("model: {family: qwen2, attention_bias: true}", "attention_bias is not computed for the family qwen2"),
        ("model: {sliding_window: 256}", "sliding_window 256 is not computed for the family llama"),
        (
            "parallel: {pipeline: 2, pipeline_layers: [3, 2]}",
            r"pipeline_layers \[3, 2\] are 2 stages of 5 layers in all, but .* is 2 and model.num_layers 4",
        ),
        ("parallel: {pipeline: 5}", "parallel.pipeline 5 exceeds model.num_layers 4"),
        ("model: {hidden_size: 250}", "hidden_size 250 is not divisible by num_attention_heads 8"),
        ("model: {num_kv_heads: 3}", "num_attention_heads 8 is not divisible by num_kv_heads 3"),
        (
            "train: {global_batch_tokens: 4097}",
            "global_batch_tokens 4097 is not divisible by train.sequence_length 256",
        ),
        ("data: {eval_sources: [wiki]}", r"eval_sources names \['wiki'\]"),
        ("data: {sources: {arxiv: {weight: -1}}}", "data.sources.arxiv.weight is -1"),
        ("data: {sources: {arxiv: {epochs: 1}}}", "data.sources.arxiv: give exactly one of .*, not weight and epochs"),
        ("data: {sources: {wiki: {}}}", "data.sources.wiki: give exactly one of .*, not none"),
        ("data: {sources: {wiki: {tokens: 0}}}", "data.sources.wiki.tokens is 0"),
        (
            "data: {weight_changes: [{from_step: 5, sources: {arxiv: {weight: 1}}}]}",
            "from step 5 must name every .*code",
        ),
    ],
)
def test_what_cannot_be_run_is_refused(extra: str, expected: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=expected) as caught:
        toy(tmp_path, extra)
    assert "\n" not in str(caught.value)


def test_all_weights_zero(tmp_path: Path) -> None:
    names = load_config(CONFIGS / "toy.yml").data.sources
    weights = ", ".join(f"{name}: {{weight: 0}}" for name in names)
    with pytest.raises(ConfigError, match="all weights are 0"):
        toy(tmp_path, f"data: {{sources: {{{weights}}}}}")


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ((1,), r"weight_changes are from steps \[1\]: they must rise, from 2 on"),
        ((9, 5), r"from steps \[9, 5\]: they must rise"),
        ((5, 5), r"from steps \[5, 5\]: they must rise"),
        ((5, 101), "one from step 101, after train.steps 100"),
    ],
)
def test_weight_changes_out_of_order_or_range(steps: tuple[int, ...], expected: str, tmp_path: Path) -> None:
    sources = {name: {"weight": 1} for name in load_config(CONFIGS / "toy.yml").data.sources}
    changes = [{"from_step": step, "sources": sources} for step in steps]
    with pytest.raises(ConfigError, match=expected):
        toy(tmp_path, f"data: {json.dumps({'weight_changes': changes})}")
    changed = toy(tmp_path, f"data: {json.dumps({'weight_changes': [{'from_step': 100, 'sources': sources}]})}")
    assert changed.data.weight_changes[0].sources["arxiv"].weight == 1


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ([{"from_step": 1, "lr": 1e-4}], r"train.*changes are from steps \[1\]: they must rise, from 2 to steps 100"),
        ([{"from_step": 9, "lr": 1e-4}, {"from_step": 9, "lr": 1e-5}], r"from steps \[9, 9\]: they must rise"),
        ([{"from_step": 101, "lr": 1e-4}], r"from steps \[101\]: they must rise, from 2 to steps 100"),
        ([{"from_step": 9}], "changes from step 9: give lr, global_batch_tokens or both"),
        ([{"from_step": 9, "global_batch_tokens": 5000}], "global_batch_tokens 5000 is not divisible by"),
    ],
)
def test_changes_that_cannot_be(changes: list[dict[str, Any]], expected: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=expected):
        toy(tmp_path, f"train: {json.dumps({'changes': changes})}")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train: {extends: [50, 100]}", r"train.*extends \[50, 100\]: all must be below steps 100"),
        (
            "train: {extends: [50]}",
            r"extends \[50\]: the shorter cosine ended at its last step.*decay_steps",
        ),
        (
            "train: {extends: [50], schedule: {kind: wsd}}\ndata: {sources: {arxiv: {tokens: 4096, weight: null}}}",
            r"train.extends \[50\]: data.sources gives arxiv in tokens or epochs.*give weights",
        ),
        (
            "train: {schedule: {warmup_steps: 10, decay_steps: 10}}",
            "decay_steps 10 is where the cosine ends, and must be above warmup_steps 10",
        ),
        (
            "train: {mask_documents: true, attention: cudnn}",
            "attention cudnn: with mask_documents.*set attention",
        ),
    ],
)
def test_settings_of_training_that_contradict_each_other(text: str, expected: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=expected):
        toy(tmp_path, text)


def test_a_changed_batch_must_fit_the_nodes_too(tmp_path: Path) -> None:
    config = toy(tmp_path, f"train: {json.dumps({'changes': [{'from_step': 9, 'global_batch_tokens': 4096 + 256}]})}")
    with pytest.raises(
        ConfigError, match=r"a global batch of 17 sequences \(4352 tokens\) is not divisible by micro batch 8"
    ):
        batch_geometry(config)


def test_sequences_before_a_step(tmp_path: Path) -> None:
    """Against a sum over the steps."""
    changes = [
        {"from_step": 3, "lr": 1e-4},
        {"from_step": 10, "global_batch_tokens": 8192},
        {"from_step": 11, "global_batch_tokens": 2048},
    ]
    config = toy(tmp_path, f"train: {json.dumps({'changes': changes})}")
    batches = [4096] * 9 + [8192] + [2048] * 90
    assert [batch_tokens(config.train, step) for step in range(1, 101)] == batches
    assert [batch_geometry(config, step=step).tokens for step in (1, 9, 10, 11, 100)] == [4096, 4096, 8192, 2048, 2048]
    for step in range(1, 102):
        assert sequences_before(config.train, step) * 256 == sum(batches[: step - 1])


def test_world_size_that_the_model_does_not_divide_names_node_counts(tmp_path: Path) -> None:
    config = toy(
        tmp_path, "parallel: {pipeline: 2}\nlaunch: {nodes: 3, ranks_per_node: 2}\ntrain: {micro_batch_size: 1}"
    )
    expected = (
        r"3 nodes x 2 ranks = world size 6, which .* = 4 does not divide; "
        r"numbers of nodes that work: 2, 4, 6, 8, 10, 12, 14, 16$"
    )
    with pytest.raises(ConfigError, match=expected):
        batch_geometry(config)


def test_batch_with_fewer_micro_batches_than_ranks_names_node_counts(tmp_path: Path) -> None:
    config = toy(tmp_path, "train: {micro_batch_size: 4}")
    with pytest.raises(ConfigError, match=r"is 4 micro batches of 4, too few for 5 .* on 5 nodes; .* 1, 2, 3, 4$"):
        batch_geometry(config, nodes=5)
    hopeless = toy(tmp_path, "train: {micro_batch_size: 5}")
    with pytest.raises(ConfigError, match=r"no number of nodes works with launch.ranks_per_node 2"):
        batch_geometry(hopeless)
    with pytest.raises(ConfigError, match=r"on 100000000000 nodes; numbers of nodes that work: 1, 2, 3, 4$"):
        batch_geometry(config, nodes=10**11)  # answered at once


def test_a_head_is_as_wide_however_the_numbers_are_written(tmp_path: Path) -> None:
    assert toy(tmp_path, "model: {hidden_size: 256.0, num_attention_heads: '8'}").model.head_dim == 32


def test_a_batch_that_the_ranks_do_not_divide(tmp_path: Path) -> None:
    geometry = batch_geometry(toy(tmp_path, "train: {micro_batch_size: 4}"), nodes=3)
    assert [geometry.micro_batches_of(rank) for rank in range(3)] == [2, 1, 1]
    assert (geometry.accumulation_steps, geometry.tokens, geometry.busy) == (2, 4096, 4 / 6)


@pytest.mark.parametrize("nodes", [1, 2, 4])
def test_batch_in_tokens_does_not_depend_on_nodes(nodes: int, tmp_path: Path) -> None:
    geometry = batch_geometry(toy(tmp_path, "train: {micro_batch_size: 4}"), nodes)
    assert geometry.tokens == 4096
    assert geometry.data_parallel * geometry.micro_batch_size * geometry.accumulation_steps == geometry.sequences == 16


def test_config_is_frozen() -> None:
    config = load_config(CONFIGS / "toy.yml")
    with pytest.raises(ValidationError, match="frozen"):
        config.train.optimizer.lr = 1.0  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        config.seed = 2  # type: ignore[misc]


FIELDS = {
    "RunConfig": 16,
    "StorageConfig": 4,
    "CheckpointsConfig": 4,
    "TokenizerConfig": 4,
    "DataConfig": 21,
    "SourceAmount": 3,
    "SourceConfig": 4,
    "WeightChange": 2,
    "TokenizeJobConfig": 7,
    "BaseModelConfig": 5,
    "RopeScalingConfig": 8,
    "ModelConfig": 16,
    "ParallelConfig": 6,
    "TrainConfig": 24,
    "ProfileConfig": 3,
    "OptimizerConfig": 5,
    "ScheduleConfig": 6,
    "ValidationConfig": 2,
    "GuardConfig": 6,
    "TrainChange": 3,
    "LaunchConfig": 13,
    "EvaluateConfig": 5,
    "ExportConfig": 1,
    "GenerationConfig": 9,
    "EvaluationTask": 10,
    "WandbConfig": 3,
    "NotifyConfig": 2,
}


def test_number_of_settings() -> None:
    """Each setting is one more thing to understand. Change this table only when a new one is worth that."""
    sections = {
        name: len(item.model_fields)
        for name, item in vars(schema).items()
        if isinstance(item, type) and issubclass(item, BaseModel)
    }
    assert sections == FIELDS


@pytest.mark.parametrize(
    "path", [p for p in CONFIGS.glob("*.yml") if p.name != "data_mixture.yml"], ids=lambda p: p.stem
)
def test_every_config_loads_and_its_batch_fits(path: Path) -> None:
    config = load_config(path)
    assert batch_geometry(config).tokens == config.train.global_batch_tokens


COMMON: dict[str, Any] = {
    "model.norm_eps": 1e-5,
    "parallel.pipeline": 1,
    "train.sequence_length": 4096,
    "train.global_batch_tokens": 4_194_304,
    "train.precision": "bf16",
    "train.gradient_clip": 1.0,
    "train.activation_checkpointing": "full",
    "train.optimizer.betas": (0.9, 0.95),
    "train.optimizer.eps": 1e-8,
    "train.optimizer.weight_decay": 0.1,
    "train.schedule.warmup_steps": 500,
    "train.schedule.min_lr_ratio": 0.033,
    "train.validation.interval": 250,
    "launch.world_size": 256,
    "launch.nodes": 32,
    "data.eval_sources": ("arxiv", "open-web-math", "algebraic-stack"),
}
LLEMMA_7B: dict[str, Any] = {
    "model.num_layers": 32,
    "model.hidden_size": 4096,
    "model.num_attention_heads": 32,
    "model.num_kv_heads": 32,
    "model.intermediate_size": 11008,
    "model.vocab_size": 32016,
    "model.rope_theta": 10000,
    "base_model.rope_theta": 1000000,
    "train.optimizer.lr": 1e-4,
    "parallel.tensor": 2,
    "train.micro_batch_size": 4,
    "train.steps": 48000,
    "train.decay_steps": 48000,
    "train.validation.iterations": 50,
    "train.checkpoint_interval": 500,
}
LLEMMA_34B: dict[str, Any] = {
    "model.num_layers": 48,
    "model.hidden_size": 8192,
    "model.num_attention_heads": 64,
    "model.num_kv_heads": 8,
    "model.intermediate_size": 22016,
    "model.vocab_size": 32000,
    "model.rope_theta": 1000000,
    "base_model.rope_theta": None,
    "train.optimizer.lr": 5e-5,
    "parallel.tensor": 8,
    "train.micro_batch_size": 2,
    "train.steps": 12000,
    "train.decay_steps": 12000,
    "train.validation.iterations": 25,
    "train.checkpoint_interval": 250,
}
WEIGHTS = {"arxiv": 2, "open-web-math": 4, "algebraic-stack": 1, "pile-sample": 0.147368, "code": 0.221053}


@pytest.mark.parametrize(
    ("name", "facts", "accumulation"), [("llemma_7b", LLEMMA_7B, 2), ("llemma_34b", LLEMMA_34B, 16)]
)
def test_llemma_configs_carry_the_published_facts(name: str, facts: dict[str, Any], accumulation: int) -> None:
    config = load_config(CONFIGS / f"{name}.yml")
    for key, expected in (COMMON | facts).items():
        value: Any = config
        for part in key.split("."):
            value = getattr(value, part)
        assert value == expected, key
    assert {source: entry.weight for source, entry in config.data.sources.items()} == WEIGHTS
    assert batch_geometry(config).accumulation_steps == accumulation
