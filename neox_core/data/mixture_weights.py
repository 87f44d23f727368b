"""From what the configuration says of each source - a weight, tokens or epochs - to the mixture's weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from neox_core.config import RunConfig, SourceAmount, batch_tokens, sequences_before
from neox_core.data.mixture import PERIOD, Mixture, SequenceCounts, Shares, largest_remainder
from neox_core.data.order_version import ORDER_VERSIONS, data_order
from neox_core.data.skipped import SkippedSequences, first_sequence
from neox_core.errors import ConfigError

TokensOf = Callable[[str], int]
"""Tokens of a source's training split; asked only for sources whose amount is given in epochs."""


def training_mixture(config: RunConfig, tokens_of: TokensOf, skipped: Sequence[SkippedSequences] = ()) -> Mixture:
    """The run's mixture, with its changes of weights, which begin at their steps also where sequences were skipped.

    Raises:
        ConfigError: amounts do not add up, or one is less than a sequence.
        DataError: a share is too small to be drawn.
    """
    changes = [
        (
            first_sequence(config.train, change.from_step, skipped),
            _shares(config, change.sources, change.from_step, tokens_of),
        )
        for change in config.data.weight_changes
    ]
    return Mixture(_shares(config, config.data.sources, 1, tokens_of), changes)


def validation_mixture(config: RunConfig, tokens_of: TokensOf) -> Mixture:
    """The validation sources, blended by what the training takes of them at its start; equally if that is nothing.

    Raises:
        ConfigError: amounts do not add up.
    """
    training = initial_mixture_weights(config, tokens_of)
    weights = {name: training[name] for name in config.data.validation_sources}
    if not any(weights.values()):
        weights = dict.fromkeys(weights, 1.0)
    smallest = sum(weights.values()) / PERIOD  # a source may be a smaller part of a long run
    return Mixture({name: max(weight, smallest) if weight else 0.0 for name, weight in weights.items()})


def _shares(config: RunConfig, sources: Mapping[str, SourceAmount], from_step: int, tokens_of: TokensOf) -> Shares:
    weights = _weights(config, sources, from_step, tokens_of)
    if not ORDER_VERSIONS[data_order(config)].exact_amounts or _are_weights(sources):
        return weights
    train = config.train
    sequences = sequences_before(train, train.steps + 1) - sequences_before(train, from_step)
    exact = np.array(list(weights.values())) * (sequences / sum(weights.values()))
    counts = dict(zip(weights, largest_remainder(exact, sequences).tolist(), strict=True))
    for name, count in counts.items():
        if weights[name] > 0 and count == 0:
            ((key, given),) = (
                sources[name].model_dump(exclude_none=True, include={"weight", "tokens", "epochs"}).items()
            )
            raise ConfigError(
                f"data.sources.{name}.{key} {given:g} is {weights[name]:,.0f} tokens of steps {from_step} to "
                f"{train.steps}, less than a sequence of {train.sequence_length}: raise it, or give the source weight 0"
            )
    return SequenceCounts(counts)


def _are_weights(sources: Mapping[str, SourceAmount]) -> bool:
    return all(source.weight is not None for source in sources.values())


def initial_mixture_weights(config: RunConfig, tokens_of: TokensOf) -> dict[str, float]:
    """Each source's weight from step 1, in some common unit.

    Raises:
        ConfigError: amounts do not add up.
    """
    return _weights(config, config.data.sources, 1, tokens_of)


def _weights(
    config: RunConfig, sources: Mapping[str, SourceAmount], from_step: int, tokens_of: TokensOf
) -> dict[str, float]:
    """Amounts are of the steps from `from_step` to the last; sources with a weight share what they leave.

    Later changes do not count here, so that adding one leaves the order before it as it was.
    """
    weights = {name: source.weight for name, source in sources.items() if source.weight is not None}
    amounts = {name: _amount(source, name, tokens_of) for name, source in sources.items() if name not in weights}
    if not amounts:
        return weights
    train = config.train
    sequences = sequences_before(train, train.steps + 1) - sequences_before(train, from_step)
    batch, total, asked = batch_tokens(train, train.steps), sequences * train.sequence_length, sum(amounts.values())
    where = f"steps {from_step} to {config.train.steps} take {total:,} tokens"
    total_weight = sum(weights.values())
    if total_weight > 0:
        if asked >= total:
            raise ConfigError(
                f"{where}, of which data.sources asks for {asked:,.0f} as tokens or epochs: nothing is left for "
                f"{', '.join(name for name, weight in weights.items() if weight)}; lower an amount or raise train.steps"
            )
        return amounts | {name: (total - asked) * weight / total_weight for name, weight in weights.items()}
    if abs(total - asked) >= batch:
        raise ConfigError(
            f"{where}, but the amounts in data.sources sum to {asked:,.0f}: set train.steps to "
            f"{train.steps + round((asked - total) / batch)}, or give one source a weight, to take what is left"
        )
    return amounts | weights


def _amount(source: SourceAmount, name: str, tokens_of: TokensOf) -> float:
    if source.tokens is not None:
        return source.tokens
    assert source.epochs is not None, "SourceAmount has one of weight, tokens and epochs"
    return source.epochs * tokens_of(name)
