"""Whether the texts of evaluation sets fit the model's sequence. Needs no torch: it is asked before any work."""

from __future__ import annotations

from typing import TYPE_CHECKING

from neox_core.config import EvaluationTask, RunConfig
from neox_core.errors import DataError
from neox_core.evaluation.items import ItemSet, asked_texts, load_item_set

if TYPE_CHECKING:
    from neox_core.data.tokenization.tokenizer import Tokenizer


def encoded(tokenizer: Tokenizer, prompt: str, text: str) -> tuple[list[int], int]:
    """Ids of a prompt and a text after it, and how many at the end count.

    The ids are those of both together, so that a word over the border is one; blanks at the prompt's end go to the
    text (as lm-evaluation-harness counts them).
    """
    stripped = prompt.rstrip()
    whole: list[int] = tokenizer.encode(prompt + text).tolist()
    return whole, len(whole) - (len(tokenizer.encode(stripped)) if stripped else 0)


def check_item_sets(config: RunConfig) -> None:
    """Whether every set of `evaluate.tasks` can be read, and one of its items or more is no longer than a sequence.

    Raises:
        ConfigError, DataError: one cannot, or none of its items is.
    """
    from neox_core.data.tokenization.tokenizer import Tokenizer

    tasks, length = config.evaluate.tasks, config.train.sequence_length
    item_sets = {name: load_item_set(name, task) for name, task in tasks.items()}
    if not item_sets:
        return
    tokenizer = Tokenizer(config.tokenizer)
    for name, item_set in item_sets.items():
        shortest = _shortest(tasks[name], item_set, tokenizer, length)
        if shortest > length:
            raise DataError(
                f"evaluate.tasks.{name}: all {len(item_set.items)} items are longer than train.sequence_length "
                f"{length}; the shortest has {shortest} tokens: leave the set out, or give shorter items"
            )


def _shortest(task: EvaluationTask, item_set: ItemSet, tokenizer: Tokenizer, enough: int) -> int:
    """Tokens that count of the shortest item; not looked for further once one has no more than `enough`."""
    found = []
    for item in sorted(item_set.items, key=lambda item: max(map(len, item.choices))):
        found.append(max(encoded(tokenizer, *pair)[1] for pair in asked_texts(item, task, item_set)))
        if found[-1] <= enough:
            break
    return min(found)
