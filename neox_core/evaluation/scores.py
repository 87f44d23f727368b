"""Scores of evaluation sets from each item's likelihoods, with intervals and paired differences.

All uncertainty is over items, by the bootstrap: items are drawn again, with replacement, 1,000 times; an interval holds
the middle 95% of what that gives. Where all items are right, or all wrong, that has no width: such a share has Wilson's
interval (1927). One item tells nothing of others: its other scores have no `low`, no `high` and no `p`. Two checkpoints
are compared on the same draws (a paired test): the p-value is that of a normal distribution with the bootstrap's
standard error, two-sided.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

DRAWS = 1_000
_LEVEL = 0.95
TWO_SIDED_95 = 1.96
"""Standard deviations on each side of a normal distribution's middle 95%."""
Record = Mapping[str, Any]
"""An item's result, as it is kept."""
Score = dict[str, float]


def solution_record(log_likelihood: float, text: str) -> dict[str, Any]:
    """What is kept of an item with a gold solution; log-likelihoods are in nats."""
    return {"log_likelihood": log_likelihood, "bytes": len(text.encode())}


def choices_record(log_likelihoods: Sequence[float], unconditional: Sequence[float], gold: int) -> dict[str, Any]:
    """What is kept of an item with choices.

    Calibrated: less the choice's likelihood after no question (PMI, arXiv 2104.08315), so that a choice is not taken
    because it is frequent.
    """
    calibrated = np.asarray(log_likelihoods) - np.asarray(unconditional)
    return {
        "gold": gold,
        "log_likelihoods": list(log_likelihoods),
        "unconditional": list(unconditional),
        "picked": int(np.argmax(log_likelihoods)),
        "picked_calibrated": int(np.argmax(calibrated)),
    }


def scores(records: Sequence[Record]) -> dict[str, Score]:
    """Each metric's value and 95% interval over items; items that were left out do not count."""
    counted = [record for record in records if "left_out" not in record]
    if not counted:
        return {}
    weights, found = _draws(len(counted)), {}
    for name, (values, sizes) in _parts(counted).items():
        found[name] = _with_interval(values, sizes, weights)
    return found


def shares(values: Sequence[float]) -> Score:
    """The mean of the items' values and its 95% interval over items."""
    return _with_interval(np.asarray(values, dtype=float), np.ones(len(values)), _draws(len(values)))


def differences(records: Sequence[Record], earlier: Sequence[Record]) -> dict[str, Score]:
    """Each metric's difference from an earlier checkpoint's on the items that both have, its interval and p-value."""
    known = {record["id"]: record for record in earlier if "left_out" not in record}
    ours = [record for record in records if "left_out" not in record and record["id"] in known]
    if not ours:
        return {}
    weights, before = _draws(len(ours)), _parts([known[record["id"]] for record in ours])
    found: dict[str, Score] = {}
    for name, (values, sizes) in _parts(ours).items():
        scored = _scored(values - before[name][0], sizes, weights)
        if (error := scored.pop("error", None)) is not None:
            certain = float(scored["value"] == 0)
            scored["p"] = math.erfc(abs(scored["value"]) / error / math.sqrt(2)) if error else certain
        found[name] = scored
    return found


def as_text(score: Score, form: str = ".4f") -> str:
    """The value, and of interval and p-value what there is."""
    text = f"{score['value']:{form}}"
    if "low" in score:
        text += f" [{score['low']:{form}}, {score['high']:{form}}]"
    return text + (f", p {score['p']:.2g}" if "p" in score else "")


def _parts(records: Sequence[Record]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Per metric each item's value and size: the metric is the sum of the values over the sum of the sizes."""
    if "bytes" in records[0]:
        bits = np.array([-record["log_likelihood"] for record in records]) / math.log(2)
        return {"bits_per_byte": (bits, np.array([record["bytes"] for record in records], dtype=float))}
    one = np.ones(len(records))
    if "greedy" in records[0]:
        return {name: (np.array(values), one) for name, values in _written(records).items()}
    likelihoods = [np.asarray(record["log_likelihoods"]) for record in records]
    gold = [record["gold"] for record in records]
    picked = {"accuracy": (np.array([float(record["picked"] == record["gold"]) for record in records]), one)}
    if "unconditional" not in records[0]:
        return picked | {"log_likelihood": (_among(likelihoods, gold), one)}
    calibrated = [values - record["unconditional"] for values, record in zip(likelihoods, records, strict=True)]
    return picked | {
        "calibrated_accuracy": (
            np.array([float(record["picked_calibrated"] == record["gold"]) for record in records]),
            one,
        ),
        "log_likelihood": (_among(likelihoods, gold), one),
        "calibrated_log_likelihood": (_among(calibrated, gold), one),
    }


def _written(records: Sequence[Record]) -> dict[str, list[float]]:
    """Of written answers: greedy, and of samples the majority's and the mean of all."""
    found = {"greedy": [float(record["greedy"][0]["correct"]) for record in records]}
    if all("majority" in record for record in records):
        found["majority"] = [float(record["majority"]["correct"]) for record in records]
        found["sample"] = [float(np.mean([given["correct"] for given in record["samples"]])) for record in records]
    return found


def _among(values: Sequence[np.ndarray], gold: Sequence[int]) -> np.ndarray:
    """log p of the right choice among the choices."""
    return np.array([v[right] - np.logaddexp.reduce(v) for v, right in zip(values, gold, strict=True)])


def _draws(items: int) -> np.ndarray:
    """How often each item is drawn, [draws, items]; the same for the same number of items."""
    return np.random.default_rng(items).multinomial(items, np.full(items, 1 / items), size=DRAWS).astype(float)


def _with_interval(values: np.ndarray, sizes: np.ndarray, weights: np.ndarray) -> Score:
    found = _scored(values, sizes, weights)
    found.pop("error", None)
    if (sizes == 1).all() and (values == values[0]).all() and values[0] in (0, 1):
        width = TWO_SIDED_95**2 / (len(values) + TWO_SIDED_95**2)
        found |= {"low": 0.0, "high": width} if values[0] == 0 else {"low": 1 - width, "high": 1.0}
    return found


def _scored(values: np.ndarray, sizes: np.ndarray, weights: np.ndarray) -> Score:
    value = float(values.sum() / sizes.sum())
    if len(values) == 1:
        return {"value": value}
    drawn = (weights @ values) / (weights @ sizes)
    low, high = np.quantile(drawn, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return {"value": value, "low": float(low), "high": float(high), "error": float(drawn.std())}
