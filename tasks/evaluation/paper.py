"""The Llemma paper's scores (arXiv 2310.10631, tables 1 and 2), and whether ours differ by more than noise."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from neox_core.errors import ConfigError
from neox_core.evaluation.scores import TWO_SIDED_95


@dataclass(frozen=True)
class PaperScores:
    """Percent of a task's items."""

    greedy: float
    majority: float | None = None


ITEMS = {"gsm8k_cot": 1319, "ocw_courses": 272, "mmlu_stem": 3018, "sat_math": 32, "minerva_math": 5000}
"""Of the paper's sets, by our tasks' names."""
PAPER: dict[str, dict[str, PaperScores]] = {
    "llemma-7b": {
        "gsm8k_cot": PaperScores(36.4, 54.0),
        "ocw_courses": PaperScores(7.7, 14.3),
        "mmlu_stem": PaperScores(37.7, 49.9),
        "sat_math": PaperScores(53.1, 78.1),
        "minerva_math": PaperScores(18.0, 33.5),
    },
    "llemma-34b": {
        "gsm8k_cot": PaperScores(51.5, 69.3),
        "ocw_courses": PaperScores(11.8, 18.4),
        "mmlu_stem": PaperScores(49.0, 59.7),
        "sat_math": PaperScores(71.9, 81.3),
        "minerva_math": PaperScores(25.0, 43.1),
    },
    "code-llama-7b": {
        "gsm8k_cot": PaperScores(10.5),
        "ocw_courses": PaperScores(4.4),
        "mmlu_stem": PaperScores(25.1),
        "sat_math": PaperScores(9.4),
        "minerva_math": PaperScores(4.5),
    },
    "code-llama-34b": {
        "gsm8k_cot": PaperScores(29.6),
        "ocw_courses": PaperScores(7.0),
        "mmlu_stem": PaperScores(40.5),
        "sat_math": PaperScores(40.6),
        "minerva_math": PaperScores(12.2),
    },
}
"""By model and task."""


def compare_with_paper(results: Mapping[str, Mapping[str, Any]], model: str) -> list[dict[str, str]]:
    """Our scores next to the paper's, a row per task and way to answer.

    A difference is within noise if it is less than 1.96 standard errors; both sides' are those of a share of
    independent items.

    Args:
        results: the content of results.json.
        model: the paper's.

    Raises:
        ConfigError: the paper has no such model.
    """
    if model not in PAPER:
        raise ConfigError(f"the paper has no model {model!r}: there are {', '.join(PAPER)}")
    rows = []
    for task, expected in PAPER[model].items():
        scores = results.get(task, {}).get("scores", {})
        for way, ours, theirs in (
            ("greedy", scores.get("greedy") or scores.get("accuracy"), expected.greedy),
            ("majority", scores.get("majority"), expected.majority),
        ):
            if theirs is not None:
                rows.append({"task": task, "answers": way} | _row(task, ours, results.get(task, {}), theirs))
    return rows


def _row(task: str, ours: Mapping[str, float] | None, result: Mapping[str, Any], theirs: float) -> dict[str, str]:
    if ours is None:
        return {"ours": "not evaluated", "paper": f"{theirs:.1f}", "difference": "", "verdict": ""}
    value, count = 100 * ours["value"], int(result["items"])
    difference = value - theirs
    noise = TWO_SIDED_95 * math.hypot(_error(value, count), _error(theirs, ITEMS[task]))
    interval = f"{100 * ours['low']:.1f} to {100 * ours['high']:.1f}, " if "low" in ours else ""
    return {
        "ours": f"{value:.1f} ({interval}{count} items)",
        "paper": f"{theirs:.1f}",
        "difference": f"{difference:+.1f} ± {noise:.1f}",
        "verdict": "within noise" if abs(difference) <= noise else "higher" if difference > 0 else "lower",
    }


def _error(percent: float, count: int) -> float:
    """Standard error of a share, in percent; of none or all as of half an item (no share is known exactly)."""
    share = min(max(percent / 100, 0.5 / count), 1 - 0.5 / count)
    return 100 * math.sqrt(share * (1 - share) / count)
