"""Sections on the recipe."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import (
    AfterValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from neox_core.config.section import Section
from neox_core.kernels.attention import AUTO, check_name, names

ActivationCheckpointing = Literal["none", "selective", "full"]
"""What a transformer layer computes again in the backward pass: nothing, all but matrix products, all."""

Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimizerConfig(Section):
    """The update rule. Weight decay applies to matrices, not to norms."""

    kind: str = Field("adamw", description="name of the optimizer: adamw, or one that was registered")
    lr: PositiveFloat = Field(description="peak learning rate")
    betas: tuple[Beta, Beta] = Field(
        (0.9, 0.95),
        description="decay of the means of gradients and of their squares; all defaults are Llemma's",
    )
    eps: PositiveFloat = Field(1e-8, description="added to the root of the mean square")
    weight_decay: NonNegativeFloat = Field(0.1, description="per step, times the learning rate; on matrices only")


class ScheduleConfig(Section):
    """Linear warmup, then down to a share of the peak: a cosine (arXiv 2310.10631), or late in the run (2405.18392)."""

    kind: Literal["cosine", "wsd"] = Field("cosine", description="wsd: warmup, stable at the peak, decay at the end")
    warmup_steps: NonNegativeInt = Field(
        500, description="steps in which the learning rate rises from 0 to its peak; as Llemma's"
    )
    decay_steps: PositiveInt | None = Field(
        None, description="cosine: step of the minimum, None: train.steps; wsd: length of the decay, None: by its share"
    )
    decay_share: Annotated[float, Field(gt=0, le=1)] = Field(0.2, description="wsd: part of train.steps that decays")
    decay_shape: Literal["linear", "1-sqrt"] = Field("1-sqrt", description="wsd: how the learning rate falls")
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = Field(
        0.033, description="lowest learning rate as a share of the peak; as Llemma's"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.kind == "cosine" and self.decay_steps is not None and self.decay_steps <= self.warmup_steps:
            raise ValueError(
                f"decay_steps {self.decay_steps} is where the cosine ends, and must be above warmup_steps "
                f"{self.warmup_steps}"
            )
        return self


Reaction = Literal["stop", "skip", "rollback"]


class GuardConfig(Section):
    """What follows when a step's loss or gradient is not finite, or its loss jumps. Its update is not done in any case.

    skip: go on with the next batch. rollback: back to the last checkpoint, and on after the batch in question.
    """

    on_not_finite: Reaction = Field(
        "stop",
        description="after a NaN or infinity, which tells of a fault more often than of a batch",
    )
    on_spike: Reaction = Field("skip", description="after a jump of the loss; only with `spike_sigma`")
    spike_sigma: PositiveFloat | None = Field(
        None, description="standard deviations above the mean loss of the window that make a spike; None: none is"
    )
    spike_window: Annotated[int, Field(ge=2)] = Field(
        100, description="steps before, whose mean and deviation tell a spike"
    )
    max_skips: NonNegativeInt = Field(3, description="batches skipped in a row; one more stops training")
    max_rollbacks: NonNegativeInt = Field(3, description="rollbacks of the whole training; one more stops it")


class TrainChange(Section):
    """Another peak learning rate or batch from a step on; a training that has not reached it takes it up."""

    from_step: PositiveInt = Field(description="first step to which it applies")
    lr: PositiveFloat | None = Field(None, description="peak of the schedule, which goes on; None: as before")
    global_batch_tokens: PositiveInt | None = Field(None, description="tokens of an update; None: as before")


class ValidationConfig(Section):
    """Validation loss during training, on `iterations` global batches; also at step 0."""

    interval: PositiveInt = Field(250, description="steps between two validations")
    iterations: PositiveInt = Field(25, description="global batches of a validation")


class ProfileConfig(Section):
    """Steps that torch's profiler records; the traces lie next to the metrics."""

    first_step: PositiveInt = Field(description="first step that is recorded")
    last_step: PositiveInt = Field(description="last step that is recorded")
    ranks: tuple[NonNegativeInt, ...] = Field((0,), description="ranks that record; each writes a trace of its own")

    @model_validator(mode="after")
    def _check(self) -> ProfileConfig:
        if self.last_step < self.first_step:
            raise ValueError(f"last_step {self.last_step} is before first_step {self.first_step}")
        return self


class TrainConfig(Section):
    """The recipe. The batch is set in tokens; gradient accumulation follows from the number of ranks."""

    steps: PositiveInt = Field(description="updates of the weights")
    sequence_length: PositiveInt = Field(description="tokens of a sequence")
    global_batch_tokens: PositiveInt = Field(description="tokens of an update, over all ranks")
    micro_batch_size: PositiveInt = Field(
        description="sequences that a rank computes at a time: as many as fit its memory"
    )
    optimizer: OptimizerConfig
    schedule: ScheduleConfig = ScheduleConfig()
    validation: ValidationConfig = ValidationConfig()
    changes: tuple[TrainChange, ...] = Field((), description="of learning rate or batch, in order of their steps")
    extends: tuple[PositiveInt, ...] = Field(
        (), description="`steps` of shorter trainings that this one goes on from, while their learning rates agree"
    )
    guard: GuardConfig = GuardConfig()
    checkpoint_interval: PositiveInt = Field(description="steps between two checkpoints; also one at the end")
    precision: Literal["bf16", "fp32"] = Field("bf16", description="master weights and gradients are fp32 in both")
    master_weights: Literal["fp32", "packed"] = Field(
        "fp32", description="packed: only what bf16 cuts off; 2 bytes less"
    )
    gradient_clip: PositiveFloat = Field(
        1.0, description="largest norm of the whole gradient; a longer one is scaled down to it"
    )
    activation_checkpointing: ActivationCheckpointing | Literal["auto"] = Field(
        "full",
        description="computed again in the backward pass: nothing, all but matrix products, all, or per layer the "
        "least that memory allows",
    )
    memory_gib: PositiveFloat | None = Field(
        None, description="what a rank may fill with activation_checkpointing: auto; None: what is free at the start"
    )
    mask_documents: bool = Field(False, description="attention stays within a document, whose positions begin at 0")
    attention: Annotated[str, AfterValidator(check_name)] = Field(
        AUTO, description=f"kernel, one of {', '.join(names())}; auto: the fastest that is installed"
    )
    cuda_graphs: Literal["auto", "off"] = Field(
        "off", description="auto: on GPUs, micro batches are recorded once, so that no kernel waits for Python"
    )
    z_loss: NonNegativeFloat = Field(0.0, description="coefficient of (log Z)^2, which keeps logits from drifting")
    loss_chunk_tokens: PositiveInt = Field(2048, description="positions whose logits are held at a time")
    dry_run: bool = Field(True, description="try a few micro batches of zeros before data and weights are read")
    log_interval: PositiveInt = Field(1, description="steps between two rows of metrics; a row costs 0.03% of a step")
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

    @model_validator(mode="after")
    def _check_extends(self) -> Self:
        if any(steps >= self.steps for steps in self.extends):
            raise ValueError(f"extends {list(self.extends)}: all must be below steps {self.steps}")
        if self.extends and self.schedule.kind == "cosine" and self.schedule.decay_steps is None:
            raise ValueError(
                f"extends {list(self.extends)}: the shorter cosine ended at its last step, so that only the warmup is "
                "the same: set schedule.decay_steps to where it ended"
            )
        return self

    @model_validator(mode="after")
    def _check_attention(self) -> Self:
        if self.mask_documents and self.attention != "auto":
            raise ValueError(
                f"attention {self.attention}: with mask_documents, attention has a kernel of its own (FlexAttention): "
                "set attention to auto"
            )
        return self

    @property
    def decay_steps(self) -> int:
        """Step at which the cosine reaches its minimum."""
        return self.schedule.decay_steps or self.steps
