"""What there is of each source, and what the run will take of it: known before the job starts."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from neox_core.config import RunConfig, sequences_before
from neox_core.data.dataset import consumption
from neox_core.data.mixture import PERIOD, Mixture
from neox_core.data.mixture_weights import training_mixture
from neox_core.errors import DataError

LEFT_OUT = ("rejected", "empty", "duplicates", "near_duplicates", "in_validation", "decontaminated")
"""Why records of a source and split are not among its documents; a record counts for the first that holds."""

Counts = Mapping[str, Mapping[str, Mapping[str, int]]]
"""source -> split -> {"documents", "bytes" (UTF-8 of the text), "tokens" (ends of documents included)}."""


def run_ledger(counts: Counts, config: RunConfig) -> dict[str, Any]:
    """The data ledger of `plan_ledger`, checked.

    Raises:
        DataError: a split that the run reads is shorter than a sequence, or a source would be repeated more than
            data.max_epochs times.
        ConfigError: the amounts that the configuration asks for do not add up.
    """
    ledger = plan_ledger(counts, config)
    check_epochs(ledger, config)
    return ledger


def plan_ledger(counts: Counts, config: RunConfig) -> dict[str, Any]:
    """What there is, and what the run takes of each source's training split.

    Returns:
        {"sources": counts, "run": {source: {"share", "sequences", "tokens", "epochs"}}, "changes": [...]}: the
        source's part of the run's sequences, the sequences, tokens (sequences x S), and passes over its tokens. Each
        change of weights is {"from_step", "shares": {source: part of the sequences from there}}.

    Raises:
        DataError, ConfigError: as `run_ledger`, but for the epochs.
    """
    _check_lengths(counts, config)
    length = config.train.sequence_length
    mixture = training_mixture(config, lambda name: counts[name]["train"]["tokens"])
    total = sequences_before(config.train, config.train.steps + 1)
    run = {
        name: {"share": sequences / total, **consumption(sequences, length, counts[name]["train"]["tokens"])}
        for name, sequences in mixture.consumed(total).items()
    }
    starts = (sequences_before(config.train, change.from_step) for change in config.data.weight_changes)
    bounds = [*starts, total]
    changes = [
        {"from_step": change.from_step, "shares": _shares(mixture, start, end)}
        for change, (start, end) in zip(config.data.weight_changes, pairwise(bounds), strict=True)
    ]
    sources = {name: {split: dict(count) for split, count in counts[name].items()} for name in counts}
    return {"sources": sources, "run": run, "changes": changes}


def _shares(mixture: Mixture, start: int, end: int) -> dict[str, float]:
    before, after = mixture.consumed(start), mixture.consumed(end)
    return {name: (after[name] - before[name]) / (end - start) for name in after}


def check_epochs(ledger: Mapping[str, Any], config: RunConfig) -> None:
    """Refuse a run that repeats a source too often.

    Raises:
        DataError: more than data.max_epochs times; the message says what to change, and to what.
    """
    limit = config.data.max_epochs
    # A weight is rounded to a part of the mixture's period, and a source's end to a sequence: no reason to refuse.
    sequences = sequences_before(config.train, config.train.steps + 1) / PERIOD + 1
    rounding = sequences * config.train.sequence_length
    for name, use in ledger["run"].items():
        tokens = ledger["sources"][name]["train"]["tokens"]
        if use["epochs"] * tokens <= limit * tokens + rounding:
            continue
        steps = int(config.train.steps * limit / use["epochs"])
        raise DataError(
            f"source {name!r} would be repeated {use['epochs']:.2f} times ({tokens:,} tokens), more than "
            f"data.max_epochs {limit:g}: {_advice(name, use, config)}, lower train.steps ({config.train.steps}) to "
            f"{steps}, or raise data.max_epochs"
        )


def _advice(name: str, use: Mapping[str, float], config: RunConfig) -> str:
    """The change of one source's own setting that brings it to the limit, the other settings being equal."""
    source, factor = config.data.sources[name], config.data.max_epochs / use["epochs"]
    key = f"data.sources.{name}"
    if config.data.weight_changes:
        return f"lower its part in data.sources or data.weight_changes by {1 - factor:.0%}"
    if source.tokens is not None:
        return f"lower {key}.tokens ({source.tokens:,}) to {int(source.tokens * factor):,}"
    if source.epochs is not None:
        return f"lower {key}.epochs ({source.epochs:g})"
    assert source.weight is not None, "SourceAmount has one of weight, tokens and epochs"
    others = sum(other.weight or 0.0 for other in config.data.sources.values()) - source.weight
    if not others:
        return f"give other sources a weight too, not only {key}"
    # A weight's part of all weights is w / (w + others).
    part = factor * source.weight / (source.weight + others)
    return f"lower {key}.weight ({source.weight:g}) to {part / (1 - part) * others:.4g}"


def _check_lengths(counts: Counts, config: RunConfig) -> None:
    """Every split that training or validation reads must hold a sequence."""
    drawn = config.data.drawn_sources
    read = [(name, "train") for name in config.data.sources if name in drawn]
    read += [(name, "validation") for name in config.data.validation_sources if "validation" in counts.get(name, {})]
    length = config.train.sequence_length
    for name, split in read:
        tokens = counts[name][split]["tokens"]
        if tokens <= length:
            raise DataError(
                f"source {name!r} has {tokens} {split} tokens, fewer than one sequence of {length} + 1: add text, "
                "leave it out, or lower train.sequence_length"
            )
