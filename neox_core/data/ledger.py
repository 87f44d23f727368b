"""What there is of each source, and what the run will take of it: known before the job starts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from neox_core.config import RunConfig
from neox_core.data.dataset import windows_in
from neox_core.data.mixture import Mixture
from neox_core.errors import DataError

Counts = Mapping[str, Mapping[str, Mapping[str, int]]]
"""source -> split -> {"documents", "bytes" (UTF-8 of the text), "tokens" (ends of documents included)}."""


def run_ledger(counts: Counts, config: RunConfig) -> dict[str, Any]:
    """The data ledger: {"sources": counts, "run": {source: {"share", "sequences", "tokens", "epochs"}}}.

    `share` is the source's part of the weights; the others are what train.steps global batches take from its training
    split: sequences, tokens (sequences x S), and passes over its sequences.

    Raises:
        DataError: a split that the run reads is shorter than a sequence, or a source would be repeated more than
            data.max_epochs times.
    """
    _check_lengths(counts, config)
    weights = {name: source.weight for name, source in config.data.sources.items()}
    total_weight = sum(weights.values())
    length = config.train.sequence_length
    consumed = Mixture(weights).consumed(config.train.steps * (config.train.global_batch_tokens // length))
    run = {}
    for name in weights:
        available = windows_in(counts[name]["train"]["tokens"], length)
        run[name] = {
            "share": weights[name] / total_weight,
            "sequences": consumed[name],
            "tokens": consumed[name] * length,
            "epochs": consumed[name] / available if consumed[name] else 0.0,
        }
        _check_epochs(name, run[name]["epochs"], available, config)
    sources = {name: {split: dict(count) for split, count in counts[name].items()} for name in counts}
    return {"sources": sources, "run": run}


def _check_lengths(counts: Counts, config: RunConfig) -> None:
    """Every split that training or validation reads must hold a sequence."""
    read = [(name, "train") for name, source in config.data.sources.items() if source.weight > 0]
    read += [(name, "validation") for name in config.data.validation_sources if "validation" in counts.get(name, {})]
    length = config.train.sequence_length
    for name, split in read:
        tokens = counts[name][split]["tokens"]
        if windows_in(tokens, length) == 0:
            raise DataError(
                f"source {name!r} has {tokens} {split} tokens, fewer than one sequence of {length} + 1: add text, "
                "leave it out, or lower train.sequence_length"
            )


def _check_epochs(name: str, epochs: float, available: int, config: RunConfig) -> None:
    limit = config.data.max_epochs
    if epochs > limit:
        raise DataError(
            f"source {name!r} would be repeated {epochs:.2f} times ({available} sequences), more than data.max_epochs "
            f"{limit:g}: lower data.sources.{name}.weight ({config.data.sources[name].weight:g}), run fewer "
            f"train.steps ({config.train.steps}), or raise data.max_epochs"
        )
