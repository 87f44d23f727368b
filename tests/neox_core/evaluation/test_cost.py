"""The planner's row about evaluation sets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from neox_core.config import EvaluateConfig, EvaluationTask, RunConfig, load_config
from neox_core.evaluation.cost import BYTES_PER_TOKEN, cost_rows, evaluation_cost
from tests.paths import CONFIGS, SHARED


def with_tasks(name: str, **tasks: EvaluationTask) -> RunConfig:
    return load_config(CONFIGS / f"{name}.yml").model_copy(update={"evaluate": EvaluateConfig(tasks=tasks)})


def test_tokens_and_share(tmp_path: Path) -> None:
    path = tmp_path / "items.jsonl"
    item = {"question": "q" * 83, "solution": "s" * 149, "options": ["1", "2"], "answer": "A"}
    path.write_text((json.dumps(item) + "\n") * 10)
    config = with_tasks("toy", solved=EvaluationTask(items=path), many=EvaluationTask(items=path, kind="choices"))
    cost = evaluation_cost(config)
    asked = len("Question: ") + 83 + len("\nAnswer:")
    assert cost.tokens == pytest.approx(10 * (asked + 150 + 2 * (asked + 2)) / BYTES_PER_TOKEN)
    assert cost.share == pytest.approx(cost.tokens / 3 / (25 * 4096))
    assert "tokens per checkpoint = " in cost_rows(config)[0][1]


def test_without_sets_or_files(tmp_path: Path) -> None:
    assert cost_rows(with_tasks("toy")) == []
    ((_, text),) = cost_rows(with_tasks("toy", lost=EvaluationTask(items=tmp_path / "none.jsonl")))
    assert "not known" in text
    assert "none.jsonl does not exist" in text


@pytest.mark.skipif(not (SHARED / "data" / "eval").is_dir(), reason="the public sets are not at hand")
@pytest.mark.parametrize("name", ["llemma_7b", "llemma_34b"])
def test_llemmas_sets_take_less_than_a_hundredth(name: str) -> None:
    folder = SHARED / "data" / "eval"
    config = with_tasks(
        name,
        gsm8k=EvaluationTask(items=folder / "gsm8k_test.jsonl", shots_from=folder / "gsm8k_fewshot.jsonl", shots=8),
        mmlu=EvaluationTask(
            items=folder / "mmlu_stem_test.jsonl", kind="choices", prompt="{question}\n{options}\nAnswer:"
        ),
        minif2f=EvaluationTask(
            items=folder / "minif2f_isabelle_test.jsonl", prompt="{informal_statement}\n", target="{informal_proof}"
        ),
    )
    cost = evaluation_cost(config)
    assert cost.share < 0.01
