"""The section `evaluate`, and the evaluation sets in it."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, StringConstraints, model_validator

from neox_core.config.section import NAME, ConfigPath, Section

WRITTEN = ", written"
"""Ends the name of a task of `generate`, unlike those of `tasks`."""
METRICS = {
    "solution": ("bits_per_byte",),
    "choices": ("accuracy", "calibrated_accuracy", "log_likelihood", "calibrated_log_likelihood"),
    "written": ("greedy", "majority", "sample"),
}
"""By kind of task."""
TEMPLATE_FIELD = re.compile(r"\{(\w+)\}")
"""Of a prompt or target: an item's field."""


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
        part = "target" if self.kind == "solution" else "prompt"
        if not TEMPLATE_FIELD.search(text := getattr(self, part)):
            raise ValueError(f"{part} {text!r} names no field, such as {{question}}: all items would be the same")
        return self


class GenerationConfig(Section):
    """Answers that chosen checkpoints write to lm-evaluation-harness's tasks, each in a job of its own on one GPU."""

    every: PositiveInt = Field(description="checkpoints of steps that this number divides; base and last one too")
    tasks: tuple[str, ...] = Field(min_length=1, description="names, as in `llemma evaluate --tasks`")
    data: ConfigPath = Field(description="folder of the sets' JSON lines")
    samples: NonNegativeInt = Field(0, description="samples per item for a majority vote; 0: greedy alone")
    temperature: PositiveFloat = Field(0.6, description="of the samples")
    seed: int = Field(1234, description="of the samples")
    limit: PositiveInt | None = Field(None, description="the first so many items of each task; None: all")
    max_tokens: PositiveInt = Field(512, description="of a written answer")
    batch_size: PositiveInt | None = Field(None, description="items at a time; None: what the memory holds")

    @model_validator(mode="after")
    def _check(self) -> GenerationConfig:
        if self.samples == 1:
            raise ValueError("samples is 1: a majority vote needs 2 or more, and 0 is none")
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
    generate: GenerationConfig | None = Field(None, description="answers written by chosen checkpoints; None: none")

    def is_to_generate(self, step: int, last_step: int) -> bool:
        """Whether the checkpoint of a step is to write answers."""
        return self.generate is not None and (step % self.generate.every == 0 or step == last_step)

    def scores(self) -> list[str]:
        """TASK/METRIC of all that a checkpoint is scored on."""
        found = [(name, metric) for name, task in self.tasks.items() for metric in METRICS[task.kind]]
        if self.generate:
            metrics = (*METRICS["written"][: 3 if self.generate.samples else 1], "accuracy", "bits_per_byte")
            found += [(f"{name}{WRITTEN}", metric) for name in self.generate.tasks for metric in metrics]
        return [f"{name}/{metric}" for name, metric in found]
