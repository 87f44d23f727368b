"""Which settings and which contents change which stage's identity: every setting is in the table."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from sentencepiece import sentencepiece_model_pb2

from neox_core.config import (
    EvaluationTask,
    GenerationConfig,
    ProfileConfig,
    RopeScalingConfig,
    RunConfig,
    SourceConfig,
    TokenizeJobConfig,
    TrainChange,
    WeightChange,
)
from neox_core.data.order_version import DATA_ORDER
from neox_core.errors import ConfigError, DataError
from tasks.identity.base import make_toy_base
from tasks.identity.specs import STAGES, convert_spec, evaluate_spec, export_spec, prepare_spec, train_spec
from tasks.identity.stage import StageSpec
from tests.neox_core.train.small_training import CONFIG

NOTHING: set[str] = set()
TRAIN = {"train", "evaluate", "export"}
CONVERT = {"convert"} | TRAIN
PREPARE = {"prepare-data"} | TRAIN
SOURCES = CONFIG.data.sources

# Setting: another value, and the stages whose results it changes.
SETTINGS: dict[str, tuple[Any, set[str]]] = {
    "name": ("other", NOTHING),
    "seed": (7, TRAIN),
    "storage.url": ("s3://other/place", NOTHING),
    "storage.endpoint_url": ("http://127.0.0.1:1", NOTHING),
    "storage.region": ("eu-west-1", NOTHING),
    "storage.patience_minutes": (5.0, NOTHING),
    "checkpoints.keep_last": (2, NOTHING),
    "checkpoints.keep_every": (500, NOTHING),
    "checkpoints.keep_best": (1, NOTHING),
    "tokenizer.end_of_document": ("unk", PREPARE),
    "tokenizer.begin_of_document": (True, PREPARE),
    "data.weight_changes": ((WeightChange(from_step=9, sources=SOURCES),), TRAIN),
    "data.sources": (SOURCES | {"arxiv": SourceConfig(weight=3)}, TRAIN),
    "data.eval_sources": (("arxiv",), PREPARE),
    "data.workers": (3, NOTHING),
    "data.max_epochs": (9.0, NOTHING),
    "data.text_key": ("body", PREPARE),
    "data.max_rejected": (0.5, PREPARE),
    "data.skip_damaged_files": (True, PREPARE),
    "data.deduplicate": (True, PREPARE),
    "data.overlap_words": (13, PREPARE),
    "data.decontaminate": (True, PREPARE),
    "data.order": (2, TRAIN),
    "data.max_damaged": (0.5, NOTHING),
    "data.test": (True, PREPARE),
    "data.near_duplicates": (0.8, PREPARE),
    "data.deduplicate_across": (True, PREPARE),
    "data.drop_validation_duplicates": (True, PREPARE),
    "data.overlap_min_words": (9, NOTHING),
    "data.slurm": (TokenizeJobConfig(), NOTHING),
    "tokenizer.engine": ("sentencepiece", NOTHING),
    "base_model.rope_theta": (1e4, CONVERT),
    "base_model.vocab_size": (2000, CONVERT),
    "base_model.new_tokens": ("zeros", CONVERT),
    "base_model.random_seed": (7, NOTHING),
    "model.num_layers": (5, CONVERT),
    "model.hidden_size": (512, CONVERT),
    "model.num_attention_heads": (16, CONVERT),
    "model.num_kv_heads": (4, CONVERT),
    "model.intermediate_size": (690, CONVERT),
    "model.vocab_size": (4096, CONVERT),
    "model.unpadded_vocab_size": (2040, CONVERT),
    "model.rope_theta": (1e4, CONVERT),
    "model.rope_scaling": (RopeScalingConfig(rope_type="linear", factor=2), CONVERT),
    "model.layers_without_rope": ((3,), CONVERT),
    "model.norm_eps": (1e-6, CONVERT),
    "model.family": ("qwen2", CONVERT),
    "model.head_dim": (64, CONVERT),
    "model.attention_bias": (True, CONVERT),
    "model.sliding_window": (512, CONVERT),
    "model.tied_embeddings": (True, CONVERT),
    "parallel.tensor": (1, CONVERT),
    "parallel.sequence": (False, NOTHING),
    "parallel.overlap": ("off", NOTHING),
    "parallel.pipeline": (2, CONVERT),
    "parallel.pipeline_layers": ((3, 1), NOTHING),
    "parallel.pipeline_schedule": ("zb-h1", NOTHING),
    "train.steps": (101, TRAIN),
    "train.sequence_length": (128, TRAIN),
    "train.global_batch_tokens": (8192, TRAIN),
    "train.micro_batch_size": (4, NOTHING),
    "train.optimizer.kind": ("other", TRAIN),
    "train.optimizer.lr": (1e-3, TRAIN),
    "train.optimizer.betas": ((0.9, 0.99), TRAIN),
    "train.optimizer.eps": (1e-7, TRAIN),
    "train.optimizer.weight_decay": (0.0, TRAIN),
    "train.schedule.kind": ("wsd", TRAIN),
    "train.schedule.decay_share": (0.1, TRAIN),
    "train.schedule.decay_shape": ("linear", TRAIN),
    "train.changes": ((TrainChange(from_step=9, lr=1e-4),), TRAIN),
    "train.guard.on_not_finite": ("skip", NOTHING),
    "train.guard.on_spike": ("stop", NOTHING),
    "train.guard.spike_sigma": (6.0, NOTHING),
    "train.guard.spike_window": (9, NOTHING),
    "train.guard.max_skips": (9, NOTHING),
    "train.guard.max_rollbacks": (9, NOTHING),
    "train.extends": ((50,), NOTHING),
    "train.schedule.warmup_steps": (11, TRAIN),
    "train.schedule.decay_steps": (50, TRAIN),
    "train.schedule.min_lr_ratio": (0.1, TRAIN),
    "train.validation.interval": (7, NOTHING),
    "train.validation.iterations": (7, NOTHING),
    "train.checkpoint_interval": (7, {"evaluate"}),
    "train.precision": ("fp32", TRAIN),
    "train.gradient_clip": (2.0, TRAIN),
    "train.activation_checkpointing": ("none", NOTHING),
    "train.memory_gib": (70.0, NOTHING),
    "train.mask_documents": (True, TRAIN),
    "train.attention": ("sdpa", NOTHING),
    "train.cuda_graphs": ("auto", NOTHING),
    "train.dry_run": (False, NOTHING),
    "train.log_interval": (7, NOTHING),
    "train.z_loss": (1e-4, TRAIN),
    "train.profile": (ProfileConfig(first_step=3, last_step=5), NOTHING),
    "train.loss_chunk_tokens": (64, NOTHING),
    "train.master_weights": ("packed", NOTHING),
    "launch.executor": ("slurm", NOTHING),
    "launch.nodes": (2, NOTHING),
    "launch.ranks_per_node": (4, NOTHING),
    "launch.device": ("cuda", NOTHING),
    "launch.cpus_per_rank": (7, NOTHING),
    "launch.time_limit_minutes": (7, NOTHING),
    "launch.hang_timeout_minutes": (7.0, NOTHING),
    "launch.max_restarts": (2, NOTHING),
    "launch.restarts_in_place": (0, NOTHING),
    "launch.partition": ("gpu", NOTHING),
    "launch.account": ("math", NOTHING),
    "launch.scratch": (Path("/node/local"), NOTHING),
    "launch.slurm_parameters": ({"qos": "high"}, NOTHING),
    "evaluate.poll_seconds": (7.0, NOTHING),
    "evaluate.micro_batch_size": (7, NOTHING),
    "evaluate.max_sequences": (7, {"evaluate"}),
    "evaluate.tasks": ({"gsm8k": EvaluationTask(items=Path("absent.jsonl"))}, {"evaluate"}),
    "evaluate.generate": (GenerationConfig(every=2, tasks=("gsm8k",), data=Path("absent")), {"evaluate"}),
    "checkpoints.best_by": ("gsm8k/bits_per_byte", NOTHING),
    "export.checkpoint": ("best", {"export"}),
    "wandb.mode": ("disabled", NOTHING),
    "wandb.project": ("other", NOTHING),
    "wandb.entity": ("other", NOTHING),
    "notify.events": (("failure",), NOTHING),
    "notify.no_step_minutes": (5.0, NOTHING),
}
PLACES = {"workdir", "tokenizer.model", "data.input", "data.evaluation_sets", "base_model.path"}
"""Where things lie, and what lies there: tested below."""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """The demo's settings with small files; must not be changed."""
    return small_config(tmp_path_factory.mktemp("run"))


def small_config(folder: Path) -> RunConfig:
    for source in SOURCES:
        for split in ("train", "validation", "test"):
            (folder / "text" / source / split).mkdir(parents=True)
            (folder / "text" / source / split / "0.jsonl").write_text(json.dumps({"text": f"{source} {split}"}))
    (folder / "base").mkdir()
    (folder / "base" / "params.json").write_text("{}")
    (folder / "base" / "consolidated.00.pth").write_bytes(b"weights")
    shutil.copy(CONFIG.tokenizer.model, folder / "tokenizer.model")
    config = changed(CONFIG, "workdir", folder / "work")
    config = changed(config, "tokenizer.model", folder / "tokenizer.model")
    config = changed(config, "data.input", str(folder / "text"))
    return changed(config, "base_model.path", folder / "base")


def changed(section: Any, key: str, value: Any) -> Any:
    """The section with another value under a dotted key."""
    name, _, rest = key.partition(".")
    return section.model_copy(update={name: changed(getattr(section, name), rest, value) if rest else value})


def specs(config: RunConfig) -> dict[str, StageSpec]:
    """As they follow from each other when the stages are run one after the other."""
    data, weights = prepare_spec(config), convert_spec(config)
    training = train_spec(config, data.fingerprint, weights.fingerprint)
    of_training = (evaluate_spec(config, training.fingerprint), export_spec(config, training.fingerprint))
    return {spec.name: spec for spec in (data, weights, training, *of_training)}


def fingerprints(config: RunConfig) -> dict[str, str]:
    return {name: spec.fingerprint for name, spec in specs(config).items()}


def differing(one: RunConfig, other: RunConfig) -> set[str]:
    """Stages that would run again."""
    before, after = fingerprints(one), fingerprints(other)
    return {name for name in STAGES if before[name] != after[name]}


def settings(section: BaseModel, prefix: str = "") -> Iterator[str]:
    """Dotted keys of all settings."""
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            yield from settings(value, f"{prefix}{name}.")
        else:
            yield prefix + name


def test_every_setting_is_in_the_table() -> None:
    """A new setting: does it change a result? Whose?"""
    assert set(settings(CONFIG)) == SETTINGS.keys() | PLACES


@pytest.mark.parametrize("key", SETTINGS)
def test_what_a_setting_changes(config: RunConfig, key: str) -> None:
    value, stages = SETTINGS[key]
    other = changed(config, key, value)
    assert other != config
    assert differing(config, other) == stages


def test_another_order_of_the_data_is_another_training(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that no training is resumed in an order that it did not begin with."""
    before = fingerprints(config)
    monkeypatch.setattr("neox_core.data.order_version.DATA_ORDER", DATA_ORDER + 1)
    after = fingerprints(config)
    assert {name for name in STAGES if before[name] != after[name]} == TRAIN


def test_a_source_more_or_less(config: RunConfig) -> None:
    fewer = changed(config, "data.sources", {name: source for name, source in SOURCES.items() if name != "code"})
    assert differing(config, fewer) == PREPARE


def test_order_does_not_matter(config: RunConfig) -> None:
    turned = changed(config, "data.sources", dict(reversed(SOURCES.items())))
    turned = changed(turned, "data.eval_sources", tuple(reversed(config.data.eval_sources)))
    assert differing(config, turned) == NOTHING


def test_places_do_not_matter(config: RunConfig, tmp_path: Path) -> None:
    assert differing(config, small_config(tmp_path)) == NOTHING
    assert prepare_spec(config).folder.name == prepare_spec(small_config(tmp_path / "again")).folder.name


def append_text(config: RunConfig) -> None:
    with (Path(config.data.input) / "code" / "train" / "0.jsonl").open("a") as file:
        file.write("\n" + json.dumps({"text": "more"}))


def add_file(config: RunConfig) -> None:
    (Path(config.data.input) / "arxiv" / "validation" / "1.jsonl").write_text(json.dumps({"text": "more"}))


def rename_file(config: RunConfig) -> None:
    """The order of files is the order of documents."""
    folder = Path(config.data.input) / "arxiv" / "train"
    (folder / "0.jsonl").rename(folder / "1.jsonl")


def change_tokenizer(config: RunConfig) -> None:
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(config.tokenizer.model.read_bytes())
    model.pieces[-1].score -= 1
    config.tokenizer.model.write_bytes(model.SerializeToString())


def change_weights(config: RunConfig) -> None:
    (config.base_model.path / "consolidated.00.pth").write_bytes(b"others")


def add_shard(config: RunConfig) -> None:
    (config.base_model.path / "consolidated.01.pth").write_bytes(b"weights")


@pytest.mark.parametrize(
    ("change", "stages"),
    [
        (append_text, PREPARE),
        (add_file, PREPARE),
        (rename_file, PREPARE),
        (change_tokenizer, PREPARE),
        (change_weights, CONVERT),
        (add_shard, CONVERT),
    ],
)
def test_contents_matter(change: Callable[[RunConfig], None], stages: set[str], tmp_path: Path) -> None:
    config = small_config(tmp_path)
    before = fingerprints(config)
    change(config)
    after = fingerprints(config)
    assert {name for name in STAGES if before[name] != after[name]} == stages


def test_what_no_stage_reads_does_not_matter(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    config = changed(config, "data.eval_sources", ("arxiv",))
    before = fingerprints(config)
    (Path(config.data.input) / "code" / "validation" / "0.jsonl").write_text(json.dumps({"text": "of no evaluation"}))
    (config.base_model.path / "tokenizer.model").write_bytes(b"next to the weights")
    assert fingerprints(config) == before


def test_inputs_are_named(config: RunConfig) -> None:
    found, made = fingerprints(config), specs(config)
    assert made["train"].inputs == {name: found[name] for name in ("prepare-data", "convert")}
    assert made["evaluate"].inputs == made["export"].inputs == {"train": found["train"]}
    assert len(set(found.values())) == len(STAGES)


def test_missing_inputs_are_errors(tmp_path: Path) -> None:
    config = changed(small_config(tmp_path), "base_model.random_seed", None)
    (config.base_model.path / "consolidated.00.pth").unlink()
    with pytest.raises(ConfigError, match=r"holds no consolidated.00.pth"):
        convert_spec(config)
    (config.base_model.path / "params.json").unlink()
    with pytest.raises(ConfigError, match=r"base_model.path .*base holds no params.json"):
        convert_spec(config)
    shutil.rmtree(Path(config.data.input) / "arxiv")
    with pytest.raises(DataError, match="source 'arxiv'"):
        prepare_spec(config)


def test_a_toys_weights_are_made_when_they_are_missing(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    shutil.rmtree(config.base_model.path)
    for key, value in {
        "num_layers": 1,
        "hidden_size": 16,
        "head_dim": 2,
        "vocab_size": 32,
        "intermediate_size": 32,
    }.items():
        config = changed(config, f"model.{key}", value)
    with pytest.raises(ConfigError, match=r"holds no params.json"):
        convert_spec(config)
    assert not config.base_model.path.exists()  # looking has no side effects
    assert make_toy_base(config)
    made = convert_spec(config).inputs
    assert not make_toy_base(config)
    assert sorted(made) == ["consolidated.00.pth", "consolidated.01.pth", "params.json"]
    assert convert_spec(config).inputs == made
    shutil.rmtree(config.base_model.path)
    assert make_toy_base(config)
    assert convert_spec(config).inputs == made  # the seed makes the same weights again


def test_evaluation_sets_are_told_by_their_content(config: RunConfig, tmp_path: Path) -> None:
    for name, question in (("one", "Why?"), ("same", "Why?"), ("other", "Why not?")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "set.jsonl").write_text(json.dumps({"question": question}))
    one, same, other = (
        changed(config, "data.evaluation_sets", (tmp_path / name / "set.jsonl",)) for name in ("one", "same", "other")
    )
    assert differing(config, one) == PREPARE
    assert differing(one, same) == set()
    assert differing(one, other) == PREPARE


def test_an_evaluation_set_counts_by_its_content(config: RunConfig, tmp_path: Path) -> None:
    one, other = tmp_path / "one.jsonl", tmp_path / "other.jsonl"
    for path in (one, other):
        path.write_text('{"question": "1+1?", "solution": "2"}\n')
    first, second = (changed(config, "evaluate.tasks", {"sums": EvaluationTask(items=path)}) for path in (one, other))
    assert differing(first, second) == NOTHING
    other.write_text('{"question": "1+1?", "solution": "3"}\n')
    assert differing(first, second) == {"evaluate"}
    shots = {"sums": EvaluationTask(items=one, shots_from=one, shots=1)}
    assert differing(first, changed(config, "evaluate.tasks", shots)) == {"evaluate"}
