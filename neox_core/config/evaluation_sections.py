"""The section `evaluate`, and the evaluation sets in it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, StringConstraints, model_validator

from neox_core.config.section import NAME, ConfigPath, Section


class EvaluationTask(Section):
    """Items that are scored by the likelihood of given texts; nothing is generated."""

    items: ConfigPath = Field(description="JSON lines, an item each")
    kind: Literal["solution", "choices"] = Field(
        "solution", description="solution: bits per byte of `target`; choices: accuracy among `options`"
    )
    prompt: str = Field(
        "Question: {question}\nAnswer:",
        description="what stands before; {name} is an item's field, {options} its options as lines A., B., ...",
    )
    target: str = Field("{solution}", description="of a solution: the text whose likelihood is measured")
    options: str = Field("options", description="of choices: the field with the list of options")
    answer: str = Field("answer", description="of choices: the field with the right option's letter or number from 0")
    score: Literal["letters", "texts"] = Field(
        "letters", description="of choices: likelihood of the option's letter or of its text"
    )
    shots_from: ConfigPath | None = Field(None, description="JSON lines whose first items are shown, solved")
    shots: NonNegativeInt = Field(0, description="how many solved items stand before each")
    limit: PositiveInt | None = Field(None, description="the first so many items; None: all")

    @model_validator(mode="after")
    def _check(self) -> EvaluationTask:
        if bool(self.shots) != (self.shots_from is not None):
            raise ValueError("shots and shots_from go together: give both, or neither")
        return self


class EvaluateConfig(Section):
    """Perplexity of every checkpoint that appears in the object store, and its scores on evaluation sets."""

    poll_seconds: PositiveFloat = Field(60.0, description="seconds between two looks for new checkpoints")
    micro_batch_size: PositiveInt = Field(
        8, description="sequences that a rank evaluates at a time; it changes speed and memory, not the result"
    )
    max_sequences: PositiveInt | None = Field(
        None, description="sequences per source; None: the whole validation split"
    )
    tasks: dict[Annotated[str, StringConstraints(pattern=NAME)], EvaluationTask] = Field(
        {}, description="evaluation sets by name"
    )
