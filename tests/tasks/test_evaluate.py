"""Which checkpoints are evaluated, and when."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from neox_core.config import EvaluateConfig, GenerationConfig
from tasks import evaluate as module
from tests.neox_core.train.small_training import CONFIG


def test_checkpoints_that_appear_while_one_writes_answers_are_evaluated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate = GenerationConfig(every=50, tasks=("gsm8k_cot",), data=tmp_path)
    config = CONFIG.model_copy(update={"evaluate": EvaluateConfig(generate=generate, poll_seconds=1e-9)})
    appeared, done, said = {0: "prefix"}, [], []
    training, spec = cast(Any, SimpleNamespace(data=None)), cast(Any, SimpleNamespace(config=config))

    def steps(_spec: Any, _training: Any, prefix: str, found: list[int], report: Any) -> list[dict[str, Any]]:
        done.extend(found)
        return [{"step": step, "sources": {}, "tasks": {}} for step in found]

    def answers(_training: Any, _spec: Any, folder: Path, step: int, prefix: str, report: Any) -> dict[str, Any]:
        report("writes")
        appeared[25] = "prefix"
        report("writes")
        assert done == [0, 25]
        appeared[50] = "prefix"
        report("writes")
        report("writes")
        done.append(f"answers of {step}")
        return {}

    for name, stand_in in {
        "require": lambda _: SimpleNamespace(folder=tmp_path),
        "overlapping_items": lambda *_: {},
        "_inherited": lambda *_: {},
        "_available": lambda _: dict(appeared),
        "evaluate_steps": steps,
        "generate_answers": answers,
        "without_overlap": lambda folder, step, tasks, overlapping: tasks,
        "keep_items": lambda folder, result: result,
        "scored_tasks": lambda result: {},
    }.items():
        monkeypatch.setattr(module, name, stand_in)
    log = cast(Any, SimpleNamespace(log=lambda result: None))
    scores = module._Scores(training, spec, tmp_path, log, lambda share, text: said.append(text))
    assert scores.evaluate_new(appeared)
    assert scores.generate_next(appeared)
    assert done == [0, 25, 50, "answers of 0"]
    assert sorted(scores.results) == [0, 25, 50]
    assert module.GENERATED in scores.results[0]
    assert said.count("writes") == 4
