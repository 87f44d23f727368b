"""Sections on raw text and its mixture."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from neox_core.config.section import NAME, ConfigPath, Location, SbatchOptions, Section

SourceName = Annotated[str, Field(pattern=NAME)]
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

    executor: str = Field("slurm", description="the scheduler; its name in tasks/jobs/registry.py")
    parallelism: PositiveInt = Field(32, description="tasks that run at the same time")
    time_limit_minutes: PositiveInt = Field(240, description="minutes of one task; files of several GB fit the default")
    memory_gb: PositiveInt = Field(4, description="gigabytes of one task; a worker stays far below the default")
    partition: str | None = Field(None, description="SLURM's partition; None: the cluster's default")
    account: str | None = Field(None, description="SLURM's account; None: yours")
    slurm_parameters: SbatchOptions = Field({}, description="further sbatch options, by name: no-requeue, mem")


class DataConfig(Section):
    """Raw text and its mixture."""

    input: Location = Field(
        description="folder that holds <source>/<split>/, or s3:// prefix in the storage section's store"
    )
    sources: dict[SourceName, SourceConfig] = Field(
        min_length=1,
        description="the mixture: per source a name, which is its folder's, and how much of it the run takes",
    )
    eval_sources: tuple[str, ...] = Field((), description="sources of validation and test; empty: all")
    workers: NonNegativeInt = Field(0, description="tokenizer processes; 0: one per CPU")
    max_epochs: PositiveFloat = Field(4.0, description="a source repeated more often is an error")
    text_key: str = Field("text", min_length=1, description="key or column of a record that holds the text")
    max_rejected: Annotated[float, Field(ge=0, le=1)] = Field(
        0.001, description="share of a source's records that may be bad; they are listed in rejected.jsonl"
    )
    skip_damaged_files: bool = Field(False, description="leave damaged files out as a whole instead of failing")
    max_damaged: Annotated[float, Field(ge=0, le=1)] = Field(
        0.1, description="share of a source's stored bytes that skip_damaged_files may leave out"
    )
    test: bool = Field(False, description="tokenize the test splits too, which no stage reads")
    deduplicate: bool = Field(False, description="keep the first of equal texts, per source and split")
    near_duplicates: Annotated[float, Field(ge=0.5, lt=1)] | None = Field(
        None,
        description="keep the first of training texts whose sets of 5 words in a row have at least this Jaccard index",
    )
    deduplicate_across: bool = Field(False, description="look for duplicates among the training texts of all sources")
    drop_validation_duplicates: bool = Field(
        False, description="drop training texts that (nearly) equal a validation text; they are reported always"
    )
    evaluation_sets: tuple[ConfigPath, ...] = Field((), description="JSON lines to look for in the training text")
    overlap_words: PositiveInt = Field(30, description="words in a row that make an overlap with an evaluation item")
    overlap_min_words: PositiveInt = Field(
        8, description="an evaluation text of fewer words than overlap_words, but so many, is looked for as a whole"
    )
    decontaminate: bool = Field(False, description="drop the training documents that overlap")
    slurm: TokenizeJobConfig | None = Field(None, description="tokenize in SLURM jobs; None: in processes here")
    weight_changes: tuple[WeightChange, ...] = Field(
        (), description="other mixtures from a step on, in order of their steps"
    )
    order: Literal[2, 3] | None = Field(
        None, description="version of the order of training sequences; null: the newest, or what the training began in"
    )

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        if self.deduplicate_across and not (self.deduplicate or self.near_duplicates):
            raise ValueError("deduplicate_across needs deduplicate or near_duplicates: set one of them")
        if self.decontaminate and not self.evaluation_sets:
            raise ValueError("decontaminate needs evaluation_sets: list the files whose items to look for")
        for amounts in (self.sources.values(), *(change.sources.values() for change in self.weight_changes)):
            if all(amount.weight == 0 for amount in amounts):
                raise ValueError("all weights are 0: give at least one source a positive weight")
            if not math.isfinite(sum(amount.weight or 0 for amount in amounts)):
                raise ValueError("the sum of the weights is too large for a number: give shares, such as 2 and 1")
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
    def drawn_sources(self) -> frozenset[str]:
        """The sources that training draws from, at its start or after a change of weights."""
        amounts: list[Mapping[str, SourceAmount]] = [self.sources, *(change.sources for change in self.weight_changes)]
        return frozenset(name for given in amounts for name, amount in given.items() if amount.weight != 0)

    @property
    def validation_sources(self) -> tuple[str, ...]:
        """The sources that validation and test use."""
        return self.eval_sources or tuple(self.sources)
