"""The run's configuration: typed, nested, frozen. One class per section of the YAML file."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import (
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from neox_core.config.checkpoint_sections import VALIDATION, CheckpointsConfig, ExportConfig
from neox_core.config.data_sections import DataConfig
from neox_core.config.evaluation_sections import EvaluateConfig
from neox_core.config.model_sections import BaseModelConfig, ModelConfig
from neox_core.config.section import NAME, ConfigPath, S3Prefix, SbatchOptions, Section
from neox_core.config.train_sections import (
    TrainConfig,
)

PipelineSchedule = Literal["1f1b", "zb-h1"]
EMBEDDED = "embedded"
"""`storage.endpoint_url`: a server on loopback, which the flows start."""


class StorageConfig(Section):
    """The object store that holds the checkpoints. Credentials come from the environment, as boto3 reads them."""

    url: S3Prefix = Field(description="s3://bucket/prefix of the checkpoints")
    endpoint_url: str | None = Field(None, description="None: AWS. 'embedded': a server on loopback, kept in workdir")
    region: str = Field("us-east-1", description="AWS's region; other stores take any name, and most this one")
    patience_minutes: PositiveFloat = Field(
        60.0, description="minutes for which a training bears a store that fails; then it stops, saved on local disk"
    )

    @field_validator("endpoint_url")
    @classmethod
    def _check_address(cls, address: str | None) -> str | None:
        scheme, _, host = (address or "").partition("://")
        if address not in (None, EMBEDDED) and (scheme not in ("http", "https") or not host.strip("/")):
            raise ValueError(
                f"{address!r} is not an address such as https://s3.example.org:9000, with http:// or https:// in front"
            )
        return address


class TokenizerConfig(Section):
    """The base model's tokenizer and the id that ends a document."""

    model: ConfigPath = Field(
        description="SentencePiece's .model file, Llama 3's, a tokenizer.json with byte-level BPE, or the folder of one"
    )
    end_of_document: str = Field(
        "eos", description="unk: what Llemma's own data has; of a tokenizer.json: the special token, <|endoftext|>"
    )
    begin_of_document: bool = Field(False, description="put the tokenizer's <s> before every document")
    engine: Literal["auto", "sentencepiece"] = Field(
        "auto", description="auto: a faster one where its ids are the same"
    )

    @property
    def file(self) -> Path:
        """The tokenizer's file; of a folder, SentencePiece's where it has both, since that one says what is right."""
        found = (self.model / name for name in ("tokenizer.model", "tokenizer.json"))
        return next((path for path in found if path.is_file()), self.model)


class ParallelConfig(Section):
    """How the model is cut; data parallelism is what remains of the ranks."""

    tensor: PositiveInt = Field(
        1, description="ranks that share each matrix, at most those of one node, since they talk in every layer"
    )
    sequence: bool = Field(True, description="tensor-parallel ranks split the tokens between attention and MLP too")
    overlap: Literal["auto", "off"] = Field(
        "auto",
        description="auto: where tensor-parallel ranks split tokens and share a host, the GPUs' copy engines exchange "
        "them alongside the matrix products; off: NCCL does, before and after these",
    )
    pipeline: PositiveInt = Field(1, description="stages of layers, one after the other; 1: all layers on each rank")
    pipeline_layers: tuple[PositiveInt, ...] | None = Field(
        None, description="transformer layers of each stage; None: balanced, with the output head counted"
    )
    pipeline_schedule: PipelineSchedule = Field(
        "1f1b",
        description="1f1b: stages wait for their first micro batch and after their last; zb-h1: they add weights' "
        "gradients meanwhile, which takes the activations of as many micro batches more as stages come before",
    )


class LaunchConfig(Section):
    """Where jobs run. One task is one rank."""

    executor: str = Field(
        "auto",
        description="slurm, local or another scheduler's name; auto: slurm if its controller answers, else local",
    )
    nodes: PositiveInt = Field(1, description="computers; with `ranks_per_node`, the number of ranks")
    ranks_per_node: PositiveInt = Field(8, description="ranks of a node, one for each of its GPUs")
    device: Literal["auto", "cuda", "cpu"] = Field("auto", description="auto: GPUs where there are some")
    cpus_per_rank: PositiveInt = Field(1, description="CPU cores of a rank, and on CPUs its threads")
    time_limit_minutes: PositiveInt = Field(
        1440, description="minutes after which SLURM ends a job; training is submitted again, see `max_restarts`"
    )
    max_restarts: NonNegativeInt = Field(
        5,
        description="how often in a row a training that ended without success is submitted again although it has saved "
        "no new checkpoint; after one, it counts anew",
    )
    restarts_in_place: NonNegativeInt = Field(
        3,
        description="how often in a row the ranks of a training of which one died or hung are started again in the "
        "same job although it has saved no new checkpoint; then the job ends. 0: it ends at once",
    )
    hang_timeout_minutes: PositiveFloat = Field(
        1.0,
        description="minutes without progress on any rank, after which it is a hang; at least three times as long as "
        "work of the kind has taken, and thirty times this for the first of a kind",
    )
    scratch: ConfigPath | None = Field(
        None,
        description="folder on each node's own disk for checkpoints on their way to and from the store; None: in "
        "workdir, which all nodes share",
    )
    partition: str | None = Field(None, description="SLURM's partition; None: the cluster's default")
    account: str | None = Field(None, description="SLURM's account; None: yours")
    slurm_parameters: SbatchOptions = Field({}, description="further sbatch options, by name: no-requeue, mem")

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.nodes * self.ranks_per_node


class WandbConfig(Section):
    """Weights & Biases."""

    mode: Literal["online", "offline", "disabled"] = Field(
        "offline",
        description="offline: written to disk, for `llemma wandb sync` later, since nodes often have no network",
    )
    project: str = Field("llemma-pretrain", description="Weights & Biases' project")
    entity: str | None = Field(None, description="team or user that the project belongs to; None: yours")


class NotifyConfig(Section):
    """What the watcher of `llemma up` tells, to the addresses in the environment variable LLEMMA_NOTIFY_URLS."""

    events: tuple[Literal["failure", "restart", "incident", "no-step", "finished"], ...] = Field(
        ("failure", "restart", "incident", "no-step", "finished"), description="those that are told, each once"
    )
    no_step_minutes: PositiveFloat = Field(30.0, description="minutes without a training step after which that is told")


class RunConfig(Section):
    """Everything that a run depends on."""

    name: str = Field(pattern=NAME, description="the run's name, in logs and in Weights & Biases")
    workdir: ConfigPath = Field(description="shared folder for artifacts, logs and jobs")
    seed: int = Field(1234, description="seed of the data's order and of what is drawn at random")
    storage: StorageConfig
    checkpoints: CheckpointsConfig = CheckpointsConfig()
    tokenizer: TokenizerConfig
    data: DataConfig
    base_model: BaseModelConfig
    model: ModelConfig
    parallel: ParallelConfig = ParallelConfig()
    train: TrainConfig
    launch: LaunchConfig = LaunchConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    export: ExportConfig = ExportConfig()
    wandb: WandbConfig = WandbConfig()
    notify: NotifyConfig = NotifyConfig()

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        _check_best(self.checkpoints, self.evaluate)
        _check_batch(self.train)
        _check_parallel(self.model, self.parallel)
        _check_sequence(self.train, self.parallel)
        _check_window(self.model, self.train)
        _check_weight_changes(self.data, self.train)
        _check_extension(self.data, self.train)
        _check_inputs(self)
        return self


def _check_best(checkpoints: CheckpointsConfig, evaluate: EvaluateConfig) -> None:
    known = evaluate.scores()
    if checkpoints.best_by not in (VALIDATION, *known):
        raise ValueError(
            f"checkpoints.best_by {checkpoints.best_by!r} is no score of this run: give {VALIDATION}"
            + (f" or one of {', '.join(known)}" if known else ", or evaluate.tasks and one of their scores")
        )


def _check_batch(train: TrainConfig) -> None:
    if train.profile and train.profile.last_step > train.steps:
        raise ValueError(f"train.profile.last_step {train.profile.last_step} is after train.steps {train.steps}")
    for tokens in (train.global_batch_tokens, *(change.global_batch_tokens or 0 for change in train.changes)):
        if tokens % train.sequence_length:
            raise ValueError(
                f"train.global_batch_tokens {tokens} is not divisible by train.sequence_length {train.sequence_length}"
            )


def _check_sequence(train: TrainConfig, parallel: ParallelConfig) -> None:
    if parallel.sequence and train.sequence_length % parallel.tensor:
        raise ValueError(
            f"train.sequence_length {train.sequence_length} is not divisible by parallel.tensor {parallel.tensor}, "
            "among whose ranks its tokens are split: change one of them, or set parallel.sequence to false"
        )


def _check_window(model: ModelConfig, train: TrainConfig) -> None:
    if model.sliding_window is not None and train.sequence_length > model.sliding_window:
        raise ValueError(
            f"train.sequence_length {train.sequence_length} exceeds model.sliding_window {model.sliding_window}: "
            "attention here is full, which is the same for sequences up to the window only"
        )


def _check_weight_changes(data: DataConfig, train: TrainConfig) -> None:
    last = data.weight_changes[-1].from_step if data.weight_changes else 1
    if last > train.steps:
        raise ValueError(f"data.weight_changes has one from step {last}, after train.steps {train.steps}")


def _check_extension(data: DataConfig, train: TrainConfig) -> None:
    amounts = [name for name, source in data.sources.items() if source.weight is None]
    if train.extends and amounts:
        raise ValueError(
            f"train.extends {list(train.extends)}: data.sources gives {', '.join(amounts)} in tokens or epochs, which "
            "are other shares of a longer training: give weights (llemma data plan shows the shares)"
        )


def _check_inputs(config: RunConfig) -> None:
    places = {"data.input": config.data.input, "base_model.path": config.base_model.path}
    for name, source in config.data.sources.items():
        places |= {f"data.sources.{name}.files.{split}": place for split, place in source.files.items()}
    remote = [f"{key} {place}" for key, place in places.items() if str(place).startswith("s3://")]
    if remote and config.storage.endpoint_url == EMBEDDED:
        raise ValueError(
            f"{' and '.join(remote)}: such places are in the storage section's store, but storage.endpoint_url is "
            f"{EMBEDDED}, a server of the run's own that holds its checkpoints: give the store's address (null: AWS), "
            "or a folder"
        )


def _check_parallel(model: ModelConfig, parallel: ParallelConfig) -> None:
    for what, count in (
        ("num_attention_heads", model.num_attention_heads),
        ("intermediate_size", model.intermediate_size),
        ("vocab_size", model.vocab_size),
    ):
        if count % parallel.tensor:
            raise ValueError(
                f"parallel.tensor {parallel.tensor} does not divide model.{what} {count}: "
                f"use one of {[n for n in range(1, parallel.tensor) if count % n == 0]}"
            )
    if model.num_kv_heads % parallel.tensor and parallel.tensor % model.num_kv_heads:
        # Where there are more ranks than KV heads, neighbours have the same one.
        raise ValueError(
            f"parallel.tensor {parallel.tensor} neither divides model.num_kv_heads {model.num_kv_heads} nor is a "
            "multiple of it"
        )
    layers = parallel.pipeline_layers
    if layers is not None and (len(layers), sum(layers)) != (parallel.pipeline, model.num_layers):
        raise ValueError(
            f"parallel.pipeline_layers {list(layers)} are {len(layers)} stages of {sum(layers)} layers in all, but "
            f"parallel.pipeline is {parallel.pipeline} and model.num_layers {model.num_layers}"
        )
    if parallel.pipeline > model.num_layers:
        raise ValueError(
            f"parallel.pipeline {parallel.pipeline} exceeds model.num_layers {model.num_layers}: "
            "every stage needs a layer"
        )
