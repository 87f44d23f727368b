"""The run's configuration: typed, nested, frozen. One class per section of the YAML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationInfo,
    model_validator,
)


def _resolve(path: Path, info: ValidationInfo) -> Path:
    base = (info.context or {}).get("base", Path.cwd())
    return Path(base, path.expanduser()).resolve()


ConfigPath = Annotated[Path, AfterValidator(_resolve)]
"""A path; a relative one is relative to the folder of the YAML file."""


class Section(BaseModel):
    """Base of all sections: immutable, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class StorageConfig(Section):
    """The object store that holds the checkpoints. Credentials come from the environment, as boto3 reads them."""

    url: str = Field(pattern=r"^s3://[^/]+(/.*)?$", description="s3://bucket/prefix")
    endpoint_url: str | None = Field(None, description="None: AWS. 'embedded': a server on loopback, kept in workdir")
    region: str = "us-east-1"


class TokenizerConfig(Section):
    """The SentencePiece model and the id that ends a document."""

    model: ConfigPath
    end_of_document: Literal["eos", "unk"] = Field("eos", description="unk: what Llemma's own data has")


class SourceConfig(Section):
    """One source of the mixture; its text lies in <data.input>/<source>/<split>/."""

    weight: NonNegativeFloat = Field(description="share of training sequences, normalised by the sum over sources")


class DataConfig(Section):
    """Raw text and its mixture."""

    input: ConfigPath
    sources: dict[str, SourceConfig] = Field(min_length=1)
    eval_sources: tuple[str, ...] = Field((), description="sources of validation and test; empty: all")
    workers: NonNegativeInt = Field(0, description="tokenizer processes; 0: one per CPU")
    max_epochs: PositiveFloat = Field(4.0, description="a source repeated more often is an error")

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        if sum(source.weight for source in self.sources.values()) <= 0:
            raise ValueError("all weights are 0: give at least one source a positive weight")
        if unknown := [name for name in self.eval_sources if name not in self.sources]:
            raise ValueError(f"eval_sources names {unknown}, which are not among sources {sorted(self.sources)}")
        return self

    @property
    def validation_sources(self) -> tuple[str, ...]:
        """The sources that validation and test use."""
        return self.eval_sources or tuple(self.sources)


class BaseModelConfig(Section):
    """The weights to start from, in Meta's raw format (params.json and consolidated.NN.pth)."""

    path: ConfigPath
    rope_theta: PositiveFloat | None = Field(
        None, description="the base's RoPE theta where the run changes it on purpose; None: model.rope_theta"
    )
    random_seed: int | None = Field(None, description="toys only: make random weights at `path` when it is missing")


class ModelConfig(Section):
    """Architecture of a Llama-family model."""

    num_layers: PositiveInt
    hidden_size: PositiveInt
    num_attention_heads: PositiveInt
    num_kv_heads: PositiveInt
    intermediate_size: PositiveInt
    vocab_size: PositiveInt
    rope_theta: PositiveFloat
    norm_eps: PositiveFloat = 1e-5

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def queries_per_kv(self) -> int:
        """Query heads that share one key-value head (1 for multi-head attention)."""
        return self.num_attention_heads // self.num_kv_heads

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not divisible by num_attention_heads {self.num_attention_heads}"
            )
        if self.num_attention_heads % self.num_kv_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not divisible by num_kv_heads {self.num_kv_heads}"
            )
        if self.head_dim % (2 * self.queries_per_kv):
            raise ValueError(
                f"head width {self.head_dim} is not divisible by 2 x {self.queries_per_kv} query heads per KV head, "
                "which NeoX's fused QKV layout needs"
            )
        return self


class ParallelConfig(Section):
    """How the model is cut; data parallelism is what remains of the ranks."""

    tensor: PositiveInt = 1
    pipeline: PositiveInt = 1


class OptimizerConfig(Section):
    """AdamW. Weight decay applies to matrices, not to norms."""

    lr: PositiveFloat
    betas: tuple[float, float] = (0.9, 0.95)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.1


class ScheduleConfig(Section):
    """Linear warmup, then cosine decay to a share of the peak (arXiv 2310.10631)."""

    warmup_steps: NonNegativeInt = 500
    decay_steps: PositiveInt | None = Field(None, description="None: train.steps")
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.033


class ValidationConfig(Section):
    """Validation loss during training, on `iterations` global batches; also at step 0."""

    interval: PositiveInt = 250
    iterations: PositiveInt = 25


class TrainConfig(Section):
    """The recipe. The batch is set in tokens; gradient accumulation follows from the number of ranks."""

    steps: PositiveInt
    sequence_length: PositiveInt
    global_batch_tokens: PositiveInt
    micro_batch_size: PositiveInt
    optimizer: OptimizerConfig
    schedule: ScheduleConfig = ScheduleConfig()
    validation: ValidationConfig = ValidationConfig()
    checkpoint_interval: PositiveInt
    precision: Literal["bf16", "fp32"] = Field("bf16", description="master weights and gradients are fp32 in both")
    master_weights: Literal["fp32", "packed"] = Field(
        "fp32", description="packed: only what bf16 cuts off; 2 bytes less"
    )
    gradient_clip: PositiveFloat = 1.0
    activation_checkpointing: Literal["none", "full"] = "full"
    loss_chunk_tokens: PositiveInt = Field(2048, description="positions whose logits are held at a time")
    log_interval: PositiveInt = 1

    @property
    def decay_steps(self) -> int:
        """Step at which the cosine reaches its minimum."""
        return self.schedule.decay_steps or self.steps


class LaunchConfig(Section):
    """Where jobs run. One task is one rank."""

    executor: Literal["auto", "slurm", "local"] = Field("auto", description="auto: slurm if sbatch is on the PATH")
    nodes: PositiveInt = 1
    ranks_per_node: PositiveInt = 8
    device: Literal["auto", "cuda", "cpu"] = "auto"
    cpus_per_rank: PositiveInt = 1
    time_limit_minutes: PositiveInt = 1440
    partition: str | None = None
    account: str | None = None
    slurm_parameters: dict[str, Any] = Field({}, description="further sbatch options, as submitit names them")

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.nodes * self.ranks_per_node


class EvaluateConfig(Section):
    """Perplexity of every checkpoint that appears in the object store."""

    poll_seconds: PositiveFloat = 60.0
    micro_batch_size: PositiveInt = 8
    max_sequences: PositiveInt | None = Field(None, description="per source; None: the whole validation split")


class WandbConfig(Section):
    """Weights & Biases."""

    mode: Literal["online", "offline", "disabled"] = "offline"
    project: str = "llemma-pretrain"
    entity: str | None = None


class RunConfig(Section):
    """Everything that a run depends on."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    workdir: ConfigPath = Field(description="shared folder for artifacts, logs and jobs")
    seed: int = 1234
    storage: StorageConfig
    tokenizer: TokenizerConfig
    data: DataConfig
    base_model: BaseModelConfig
    model: ModelConfig
    parallel: ParallelConfig = ParallelConfig()
    train: TrainConfig
    launch: LaunchConfig = LaunchConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    wandb: WandbConfig = WandbConfig()

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        _check_batch(self.train)
        _check_parallel(self.model, self.parallel)
        return self


def _check_batch(train: TrainConfig) -> None:
    if train.global_batch_tokens % train.sequence_length:
        raise ValueError(
            f"train.global_batch_tokens {train.global_batch_tokens} is not divisible by "
            f"train.sequence_length {train.sequence_length}"
        )


def _check_parallel(model: ModelConfig, parallel: ParallelConfig) -> None:
    for what, count in (
        ("num_attention_heads", model.num_attention_heads),
        ("num_kv_heads", model.num_kv_heads),
        ("intermediate_size", model.intermediate_size),
        ("vocab_size", model.vocab_size),
    ):
        if count % parallel.tensor:
            raise ValueError(
                f"parallel.tensor {parallel.tensor} does not divide model.{what} {count}: "
                f"use one of {[n for n in range(1, parallel.tensor) if count % n == 0]}"
            )
    if parallel.pipeline > model.num_layers:
        raise ValueError(
            f"parallel.pipeline {parallel.pipeline} exceeds model.num_layers {model.num_layers}: "
            "every stage needs a layer"
        )
