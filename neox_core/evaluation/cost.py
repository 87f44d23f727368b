"""What scoring every checkpoint on evaluation sets takes, in addition to the training."""

from __future__ import annotations

from dataclasses import dataclass

from neox_core.config import EvaluationTask, RunConfig, batch_tokens
from neox_core.errors import LlemmaError
from neox_core.evaluation.items import load_item_set
from neox_core.units import format_count

BYTES_PER_TOKEN = 2.5
"""Of mathematical text in a vocabulary of Llama's kind and size: 2.7 on GSM8K, 3.5 on MMLU-STEM, 2.3 on miniF2F."""
_FORWARD_SHARE = 1 / 3
"""FLOPs of a forward pass: 2 of the 6 per parameter and token that training takes (arXiv 2204.02311, appendix B)."""


@dataclass(frozen=True)
class EvaluationCost:
    """Of one checkpoint."""

    tokens: float
    """That go through the model."""
    share: float
    """GPU time, in that of the training from one checkpoint to the next, at the same utilisation."""

    def __str__(self) -> str:
        tokens = format_count(int(self.tokens))
        return f"about {tokens} tokens per checkpoint = {self.share:.2%} of the training's GPU time"


def evaluation_cost(config: RunConfig) -> EvaluationCost:
    """Work out the cost of `evaluate.tasks`; perplexity of the validation splits comes on top.

    Raises:
        ConfigError, DataError: a set cannot be read.
    """
    limit = float(config.train.sequence_length)
    tokens = sum(_tokens(name, task, limit) for name, task in config.evaluate.tasks.items())
    trained = config.train.checkpoint_interval * batch_tokens(config.train, step=1)
    return EvaluationCost(tokens, tokens * _FORWARD_SHARE / trained)


def _tokens(name: str, task: EvaluationTask, limit: float) -> float:
    item_set = load_item_set(name, task)
    shots = len(item_set.shots.encode())
    total = 0.0
    for item in item_set.items:
        prompt = shots + len(item.prompt.encode())
        total += sum(min(limit, (prompt + len(choice.encode())) / BYTES_PER_TOKEN) for choice in item.choices)
    return total


def cost_rows(config: RunConfig) -> list[tuple[str, str]]:
    """The plan's row about evaluation; none without `evaluate.tasks`."""
    if not config.evaluate.tasks:
        return []
    try:
        return [("evaluation sets", str(evaluation_cost(config)))]
    except LlemmaError as error:
        return [("evaluation sets", f"not known: {error}")]
