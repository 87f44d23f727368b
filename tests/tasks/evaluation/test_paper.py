"""Our scores next to the paper's."""

from __future__ import annotations

from typing import Any

import pytest

from neox_core.errors import ConfigError
from tasks.evaluation.paper import ITEMS, PAPER, compare_with_paper


def result(items: int, **values: float) -> dict[str, Any]:
    scores = {name: {"value": value, "low": value - 0.02, "high": value + 0.02} for name, value in values.items()}
    return {"items": items, "scores": scores}


def test_differences_and_noise() -> None:
    results = {
        "gsm8k_cot": result(1319, greedy=0.350, majority=0.60),
        "mmlu_stem": result(3018, accuracy=0.300),
        "sat_math": result(32, accuracy=0.40),
    }
    rows = {(row["task"], row["answers"]): row for row in compare_with_paper(results, "llemma-7b")}
    assert rows["gsm8k_cot", "greedy"]["ours"] == "35.0 (33.0 to 37.0, 1319 items)"
    # Two binomial shares: 1.96 * sqrt(0.35 * 0.65 / 1319 + 0.364 * 0.636 / 1319) = 3.66%.
    assert rows["gsm8k_cot", "greedy"]["difference"] == "-1.4 ± 3.7"
    assert rows["gsm8k_cot", "greedy"]["verdict"] == "within noise"
    assert rows["gsm8k_cot", "majority"]["verdict"] == "higher"
    assert rows["mmlu_stem", "greedy"]["verdict"] == "lower"
    assert rows["sat_math", "greedy"]["verdict"] == "within noise"  # 13 points, of 32 items
    assert rows["minerva_math", "greedy"]["ours"] == "not evaluated"


def test_no_item_right_is_not_certainty() -> None:
    rows = compare_with_paper({"sat_math": result(32, accuracy=0.0)}, "code-llama-7b")
    # 1.96 * sqrt(p (1 - p) / 32 + 0.094 * 0.906 / 32) with p = 0.5 / 32: 11.0%; with p = 0 it would be 10.1%.
    assert next(row for row in rows if row["task"] == "sat_math")["difference"] == "-9.4 ± 11.0"


def test_models() -> None:
    assert all(scores.keys() == ITEMS.keys() for scores in PAPER.values())
    with pytest.raises(ConfigError, match="no model 'llama': there are llemma-7b"):
        compare_with_paper({}, "llama")
