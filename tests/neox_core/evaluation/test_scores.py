"""Scores, their intervals and paired differences, against what is known of the distributions drawn from."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from neox_core.evaluation.scores import as_text, choices_record, differences, scores, solution_record


def choices(correct: np.ndarray) -> list[dict[str, Any]]:
    """Items whose first choice is right; it is picked where `correct` says so."""
    return [
        {"id": number, **choices_record([0.0, -1.0] if right else [-1.0, 0.0], [0.0, 0.0], 0)}
        for number, right in enumerate(correct)
    ]


def test_accuracy_and_its_interval() -> None:
    found = scores(choices(np.arange(400) % 4 > 0))["accuracy"]
    error = math.sqrt(0.75 * 0.25 / 400)  # of a binomial share
    assert found["value"] == 0.75
    assert found["low"] == pytest.approx(0.75 - 1.96 * error, abs=0.01)
    assert found["high"] == pytest.approx(0.75 + 1.96 * error, abs=0.01)


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    generator = np.random.default_rng(0)
    inside = 0
    for _ in range(200):
        found = scores(choices(generator.random(150) < 0.3))["accuracy"]
        inside += found["low"] <= 0.3 <= found["high"]
    assert 0.90 <= inside / 200 <= 0.99


@pytest.mark.parametrize("items", [1, 5, 100])
def test_shares_of_none_and_of_all_have_wilsons_interval(items: int) -> None:
    z, end = 1.96, {}
    for right in (False, True):
        found = scores(choices(np.full(items, right)))["accuracy"]
        middle = (float(right) + z**2 / (2 * items)) / (1 + z**2 / items)
        reach = z / (1 + z**2 / items) * math.sqrt(z**2 / (4 * items**2))
        assert (found["low"], found["high"]) == pytest.approx((middle - reach, middle + reach), abs=1e-9)
        end[right] = found
    assert end[False]["low"] == 0 == end[False]["value"]
    assert end[True]["high"] == 1 == end[True]["value"]


def test_one_item_tells_nothing_of_others() -> None:
    before, after = ([{"id": 0, **solution_record(value, "x" * 20)}] for value in (-8.0, -9.0))
    found = scores(after)["bits_per_byte"]
    assert found == {"value": pytest.approx(9 / (20 * math.log(2)))}
    difference = differences(after, before)["bits_per_byte"]
    assert difference == {"value": pytest.approx(1 / (20 * math.log(2)))}
    assert (as_text(found), as_text(difference, "+.4f")) == ("0.6492", "+0.0721")
    assert as_text({"value": 0.5, "low": 0.4, "high": 0.6, "p": 0.03}) == "0.5000 [0.4000, 0.6000], p 0.03"
    answers = [{"correct": right} for right in (True, False)]
    written = {"id": 0, "greedy": answers[:1], "samples": answers, "majority": answers[0]}
    assert scores([written])["sample"] == {"value": 0.5}


def test_likelihood_among_choices() -> None:
    record = {"id": 0, **choices_record([-1.0, -2.0, -3.0], [-1.0, -5.0, -3.0], 1)}
    found = scores([record])
    assert (record["picked"], record["picked_calibrated"]) == (0, 1)
    assert found["log_likelihood"]["value"] == pytest.approx(-2 - math.log(math.exp(-1) + math.exp(-2) + math.exp(-3)))
    assert found["calibrated_log_likelihood"]["value"] == pytest.approx(3 - math.log(1 + math.exp(3) + 1))
    assert (found["accuracy"]["value"], found["calibrated_accuracy"]["value"]) == (0, 1)


def test_bits_per_byte_weigh_items_by_their_bytes() -> None:
    records = [
        {"id": 0, **solution_record(-3 * math.log(2), "abc")},
        {"id": 1, **solution_record(-8 * math.log(2), "é")},
        {"id": 2, "left_out": "too long"},
    ]
    assert scores(records)["bits_per_byte"]["value"] == pytest.approx(11 / 5)
    assert scores(records[2:]) == {}


def test_a_paired_difference_sees_what_intervals_hide() -> None:
    generator = np.random.default_rng(1)
    hard = generator.normal(-40, 15, 200)  # items differ much, checkpoints little
    before = [{"id": n, **solution_record(v, "x" * 20)} for n, v in enumerate(hard)]
    after = [{"id": n, **solution_record(v + generator.normal(0.5, 1), "x" * 20)} for n, v in enumerate(hard)]
    old, new = scores(before)["bits_per_byte"], scores(after)["bits_per_byte"]
    assert new["low"] < old["value"] < new["high"]
    found = differences(after, before)["bits_per_byte"]
    assert found["value"] == pytest.approx(new["value"] - old["value"])
    assert found["high"] < 0
    assert found["p"] < 1e-6


def test_no_difference() -> None:
    records = choices(np.arange(10) % 2 > 0)
    assert differences(records, records)["accuracy"] == {"value": 0, "low": 0, "high": 0, "p": 1}
    assert differences(records, []) == {}


def test_p_values_are_uniform_without_a_difference() -> None:
    generator = np.random.default_rng(2)
    small = 0
    for _ in range(200):
        one, other = (choices(generator.random(100) < 0.5) for _ in range(2))
        small += differences(one, other)["accuracy"]["p"] < 0.05
    assert small / 200 <= 0.10
