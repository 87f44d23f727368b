"""The sections `checkpoints` and `export`: which checkpoints stay, and which becomes a model."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from neox_core.config.section import Section

VALIDATION = "validation"
"""`checkpoints.best_by`: the validation loss."""


class CheckpointsConfig(Section):
    """Which checkpoints stay in the store. One goes when a newer one is complete and nothing here keeps it."""

    keep_last: PositiveInt | None = Field(None, description="the newest ones that stay; None: all stay")
    keep_every: PositiveInt | None = Field(
        None, description="those of steps that this number divides stay too; None: none for that reason"
    )
    keep_best: NonNegativeInt = Field(
        0, description="the best ones by `best_by` stay too, as many; those that are not scored yet stay until then"
    )
    best_by: str = Field(
        VALIDATION,
        description="validation: the lowest loss, of steps with a validation; or TASK/METRIC of evaluate, such as "
        "gsm8k/bits_per_byte, mmlu_stem/accuracy, or 'gsm8k_cot, written/greedy'",
    )

    @model_validator(mode="after")
    def _check(self) -> CheckpointsConfig:
        if self.keep_last is None and (self.keep_every is not None or self.keep_best):
            raise ValueError("keep_every and keep_best need keep_last: without it, all checkpoints stay")
        return self


class ExportConfig(Section):
    """Which checkpoint becomes the model in Hugging Face's format."""

    checkpoint: Literal["last", "best"] = Field("last", description="best: by `checkpoints.best_by`")
