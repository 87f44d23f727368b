"""The run's configuration: typed, nested, frozen. One class per section of the YAML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationInfo,
    model_validator,
)

_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"


def _resolve(path: Path, info: ValidationInfo) -> Path:
    base = (info.context or {}).get("base", Path.cwd())
    return Path(base, path.expanduser()).resolve()


ConfigPath = Annotated[Path, AfterValidator(_resolve)]
"""A path; a relative one is relative to the folder of the YAML file."""


class Section(BaseModel):
    """Base of all sections: immutable, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _refuse_stray_booleans(cls, values: Any) -> Any:
        # Where another type is due, pydantic would read `steps: yes` as 1.
        switches = {name for name, field in cls.model_fields.items() if field.annotation is bool}
        for name, value in values.items() if isinstance(values, dict) else ():
            if isinstance(value, bool) and name not in switches:
                raise ValueError(f"{name} is {value}: give a number, a name or a section, not yes or no")
        return values


class StorageConfig(Section):
    """The object store that holds the checkpoints. Credentials come from the environment, as boto3 reads them."""

    url: str = Field(pattern=r"^s3://[^/]+(/.*)?$", description="s3://bucket/prefix")
    endpoint_url: str | None = Field(None, description="None: AWS. 'embedded': a server on loopback, kept in workdir")
    region: str = "us-east-1"


class TokenizerConfig(Section):
    """The SentencePiece model and the id that ends a document."""

    model: ConfigPath
    end_of_document: Literal["eos", "unk"] = Field("eos", description="unk: what Llemma's own data has")
    begin_of_document: bool = Field(False, description="put the tokenizer's <s> before every document")
    engine: Literal["auto", "sentencepiece"] = Field(
        "auto", description="auto: a faster one where its ids are the same"
    )


def _as_text(location: object) -> object:
    return str(location) if isinstance(location, Path) else location


def _resolve_location(location: str, info: ValidationInfo) -> str:
    return location if location.startswith("s3://") else str(_resolve(Path(location), info))


Location = Annotated[str, BeforeValidator(_as_text), AfterValidator(_resolve_location)]
"""A path or glob, relative to the folder of the YAML file, or s3://bucket/prefix."""


S3Prefix = Annotated[str, Field(pattern=r"^s3://[^/]+(/.*)?$")]
"""A folder in an object store."""


SourceName = Annotated[str, Field(pattern=_NAME)]
"""A source is also a folder, of text and of tokens."""


class SourceAmount(Section):
    """How much the run takes of a source. Exactly one key is given."""

    weight: NonNegativeFloat | None = Field(
        None, description="share of the training sequences that no amount takes, normalised by the sum of weights"
    )
    tokens: PositiveInt | None = Field(None, description="tokens that the run takes")
    epochs: PositiveFloat | None = Field(None, description="passes over the source that the run takes")

    @model_validator(mode="after")
    def _check_one(self) -> Self:
        given = [key for key in ("weight", "tokens", "epochs") if getattr(self, key) is not None]
        if len(given) != 1:
            raise ValueError(
                f"give exactly one of weight, tokens and epochs, not {' and '.join(given) or 'none'} (null takes an "
                "included one back)"
            )
        return self


class SourceConfig(SourceAmount):
    """One source of the mixture; its text lies in <data.input>/<source>/<split>/ unless `files` says where."""

    files: dict[Literal["train", "validation", "test"], Location] = Field(
        {}, description="per split a folder, a glob or an s3:// prefix"
    )


class WeightChange(Section):
    """Another mixture from a step on; a training that has not reached it takes it up when it resumes."""

    from_step: PositiveInt = Field(description="first step whose batch is drawn with it")
    sources: dict[str, SourceAmount] = Field(description="every source; amounts are of the steps from here to the last")


class TokenizeJobConfig(Section):
    """Tokenization as a SLURM job array: one task per file, or per group of files if there are over 1,000."""

    parallelism: PositiveInt = Field(32, description="tasks that run at the same time")
    time_limit_minutes: PositiveInt = 240
    memory_gb: PositiveInt = 4
    partition: str | None = None
    account: str | None = None
    slurm_parameters: dict[str, Any] = Field({}, description="further sbatch options, as submitit names them")


class DataConfig(Section):
    """Raw text and its mixture."""

    input: Location = Field(description="folder or s3:// prefix that holds <source>/<split>/")
    sources: dict[SourceName, SourceConfig] = Field(min_length=1)
    eval_sources: tuple[str, ...] = Field((), description="sources of validation and test; empty: all")
    workers: NonNegativeInt = Field(0, description="tokenizer processes; 0: one per CPU")
    max_epochs: PositiveFloat = Field(4.0, description="a source repeated more often is an error")
    text_key: str = Field("text", min_length=1, description="key or column of a record that holds the text")
    max_rejected: Annotated[float, Field(ge=0, le=1)] = Field(
        0.001, description="share of a source's records that may be bad; they are listed in rejected.jsonl"
    )
    skip_damaged_files: bool = Field(False, description="leave damaged files out as a whole instead of failing")
    deduplicate: bool = Field(False, description="keep the first of equal texts, per source and split")
    evaluation_sets: tuple[ConfigPath, ...] = Field((), description="JSON lines to look for in the training text")
    overlap_words: PositiveInt = Field(30, description="words in a row that make an overlap with an evaluation item")
    decontaminate: bool = Field(False, description="drop the training documents that overlap")
    slurm: TokenizeJobConfig | None = Field(None, description="tokenize in SLURM jobs; None: in processes here")
    weight_changes: tuple[WeightChange, ...] = Field((), description="in order of their steps")

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        if self.decontaminate and not self.evaluation_sets:
            raise ValueError("decontaminate needs evaluation_sets: list the files whose items to look for")
        for amounts in (self.sources.values(), *(change.sources.values() for change in self.weight_changes)):
            if all(amount.weight == 0 for amount in amounts):
                raise ValueError("all weights are 0: give at least one source a positive weight")
        self._check_changes()
        if unknown := [name for name in self.eval_sources if name not in self.sources]:
            raise ValueError(f"eval_sources names {unknown}, which are not among sources {sorted(self.sources)}")
        return self

    def _check_changes(self) -> None:
        steps = [change.from_step for change in self.weight_changes]
        if steps != sorted(set(steps)) or 1 in steps:
            raise ValueError(f"weight_changes are from steps {steps}: they must rise, from 2 on")
        for change in self.weight_changes:
            if different := sorted(set(change.sources) ^ set(self.sources)):
                raise ValueError(
                    f"weight_changes from step {change.from_step} must name every source and no other, with weight 0 "
                    f"for those to leave out: look at {', '.join(different)}"
                )

    @property
    def validation_sources(self) -> tuple[str, ...]:
        """The sources that validation and test use."""
        return self.eval_sources or tuple(self.sources)


class BaseModelConfig(Section):
    """The weights to start from: a folder in Meta's raw format (params.json, consolidated.NN.pth) or Hugging Face's."""

    path: ConfigPath | S3Prefix = Field(description="a folder, or s3://bucket/prefix in the storage section's store")
    rope_theta: PositiveFloat | None = Field(
        None, description="the base's RoPE theta where the run changes it on purpose; None: model.rope_theta"
    )
    vocab_size: PositiveInt | None = Field(
        None, description="the base's vocabulary where the run adds tokens or padding on purpose; None: the model's"
    )
    new_tokens: Literal["mean", "normal", "zeros"] = Field("mean", description="how rows that the base lacks are made")
    random_seed: int | None = Field(None, description="toys only: make random weights at `path` when it is missing")


class RopeScalingConfig(Section):
    """Positions of a model that was extended to longer sequences, as Hugging Face names them (see model/rope.py)."""

    rope_type: Literal["linear", "llama3"]
    factor: PositiveFloat
    low_freq_factor: PositiveFloat | None = Field(None, description="llama3 only, like the next two; Llama 3.1: 1")
    high_freq_factor: PositiveFloat | None = Field(None, description="Llama 3.1: 4")
    original_max_position_embeddings: PositiveInt | None = Field(None, description="Llama 3.1: 8192")

    @model_validator(mode="after")
    def _check(self) -> RopeScalingConfig:
        blend = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        given = [name for name in blend if getattr(self, name) is not None]
        if given != (list(blend) if self.rope_type == "llama3" else []):
            raise ValueError(
                f"llama3 needs {', '.join(blend)}, and linear takes none; {self.rope_type} has {given or 'none'}"
            )
        if self.low_freq_factor and self.high_freq_factor and self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor {self.high_freq_factor} must exceed low_freq_factor {self.low_freq_factor}"
            )
        return self


class ModelConfig(Section):
    """Architecture of a Llama-family model."""

    num_layers: PositiveInt
    hidden_size: PositiveInt
    num_attention_heads: PositiveInt
    num_kv_heads: PositiveInt
    intermediate_size: PositiveInt
    vocab_size: PositiveInt
    unpadded_vocab_size: PositiveInt | None = Field(
        None, description="tokens; the rows of vocab_size above it are padding, cut off on export. None: no padding"
    )
    rope_theta: PositiveFloat
    rope_scaling: RopeScalingConfig | None = Field(None, description="None: positions are not scaled")
    norm_eps: PositiveFloat = 1e-5

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def num_tokens(self) -> int:
        """Rows of the vocabulary that stand for tokens."""
        return self.unpadded_vocab_size or self.vocab_size

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
        if self.num_tokens > self.vocab_size:
            raise ValueError(f"unpadded_vocab_size {self.num_tokens} exceeds vocab_size {self.vocab_size}")
        return self


class ParallelConfig(Section):
    """How the model is cut; data parallelism is what remains of the ranks."""

    tensor: PositiveInt = 1
    sequence: bool = Field(True, description="tensor-parallel ranks split the tokens between attention and MLP too")
    pipeline: PositiveInt = 1
    pipeline_layers: tuple[PositiveInt, ...] | None = Field(
        None, description="transformer layers of each stage; None: balanced, with the output head counted"
    )


Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimizerConfig(Section):
    """AdamW. Weight decay applies to matrices, not to norms."""

    lr: PositiveFloat
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.1


class ScheduleConfig(Section):
    """Linear warmup, then down to a share of the peak: a cosine (arXiv 2310.10631), or late in the run (2405.18392)."""

    kind: Literal["cosine", "wsd"] = Field("cosine", description="wsd: warmup, stable at the peak, decay at the end")
    warmup_steps: NonNegativeInt = 500
    decay_steps: PositiveInt | None = Field(
        None, description="cosine: step of the minimum, None: train.steps; wsd: length of the decay, None: by its share"
    )
    decay_share: Annotated[float, Field(gt=0, le=1)] = Field(0.2, description="wsd: part of train.steps that decays")
    decay_shape: Literal["linear", "1-sqrt"] = Field("1-sqrt", description="wsd")
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.033


Reaction = Literal["stop", "skip", "rollback"]


class GuardConfig(Section):
    """What follows when a step's loss or gradient is not finite, or its loss jumps. Its update is not done in any case.

    skip: go on with the next batch. rollback: back to the last checkpoint, and on after the batch in question.
    """

    on_not_finite: Reaction = "stop"
    on_spike: Reaction = "skip"
    spike_sigma: PositiveFloat | None = Field(
        None, description="standard deviations above the mean loss of the window that make a spike; None: none is"
    )
    spike_window: Annotated[int, Field(ge=2)] = Field(100, description="steps")
    max_skips: NonNegativeInt = Field(3, description="in a row; then training stops")
    max_rollbacks: NonNegativeInt = Field(3, description="of the whole training; then it stops")


class TrainChange(Section):
    """Another peak learning rate or batch from a step on; a training that has not reached it takes it up."""

    from_step: PositiveInt
    lr: PositiveFloat | None = Field(None, description="peak of the schedule, which goes on; None: as before")
    global_batch_tokens: PositiveInt | None = Field(None, description="None: as before")


class ValidationConfig(Section):
    """Validation loss during training, on `iterations` global batches; also at step 0."""

    interval: PositiveInt = 250
    iterations: PositiveInt = 25


class ProfileConfig(Section):
    """Steps that torch's profiler records; the traces lie beside the metrics."""

    first_step: PositiveInt
    last_step: PositiveInt
    ranks: tuple[NonNegativeInt, ...] = (0,)

    @model_validator(mode="after")
    def _check(self) -> ProfileConfig:
        if self.last_step < self.first_step:
            raise ValueError(f"last_step {self.last_step} is before first_step {self.first_step}")
        return self


class TrainConfig(Section):
    """The recipe. The batch is set in tokens; gradient accumulation follows from the number of ranks."""

    steps: PositiveInt
    sequence_length: PositiveInt
    global_batch_tokens: PositiveInt
    micro_batch_size: PositiveInt
    optimizer: OptimizerConfig
    schedule: ScheduleConfig = ScheduleConfig()
    validation: ValidationConfig = ValidationConfig()
    changes: tuple[TrainChange, ...] = Field((), description="in order of their steps")
    guard: GuardConfig = GuardConfig()
    checkpoint_interval: PositiveInt
    precision: Literal["bf16", "fp32"] = Field("bf16", description="master weights and gradients are fp32 in both")
    master_weights: Literal["fp32", "packed"] = Field(
        "fp32", description="packed: only what bf16 cuts off; 2 bytes less"
    )
    gradient_clip: PositiveFloat = 1.0
    activation_checkpointing: Literal["none", "selective", "full", "auto"] = Field(
        "full",
        description="computed again in the backward pass: nothing, all but matrix products, all, or per layer the "
        "least that memory allows",
    )
    memory_gib: PositiveFloat | None = Field(
        None, description="what a rank may fill with activation_checkpointing: auto; None: what is free at the start"
    )
    mask_documents: bool = Field(False, description="attention stays within a document, whose positions begin at 0")
    attention: Literal["auto", "flash_attn_4", "flash_attn", "cudnn", "sdpa"] = Field(
        "auto", description="kernel; auto: the fastest that is installed"
    )
    z_loss: NonNegativeFloat = Field(0.0, description="coefficient of (log Z)^2, which keeps logits from drifting")
    loss_chunk_tokens: PositiveInt = Field(2048, description="positions whose logits are held at a time")
    dry_run: bool = Field(True, description="try a few micro batches of zeros before data and weights are read")
    log_interval: PositiveInt = 1
    profile: ProfileConfig | None = Field(None, description="steps to record with torch's profiler; None: none")

    @model_validator(mode="after")
    def _check_changes(self) -> Self:
        steps = [change.from_step for change in self.changes]
        if steps != sorted(set(steps)) or 1 in steps or steps[-1:] > [self.steps]:
            raise ValueError(f"changes are from steps {steps}: they must rise, from 2 to steps {self.steps}")
        for change in self.changes:
            if change.lr is None and change.global_batch_tokens is None:
                raise ValueError(f"changes from step {change.from_step}: give lr, global_batch_tokens or both")
        return self

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
    hang_timeout_minutes: PositiveFloat = Field(10.0, description="without a step on any rank; then the job ends")
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

    name: str = Field(pattern=_NAME)
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
        _check_sequence(self.train, self.parallel)
        _check_weight_changes(self.data, self.train)
        return self


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


def _check_weight_changes(data: DataConfig, train: TrainConfig) -> None:
    last = data.weight_changes[-1].from_step if data.weight_changes else 1
    if last > train.steps:
        raise ValueError(f"data.weight_changes has one from step {last}, after train.steps {train.steps}")


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
