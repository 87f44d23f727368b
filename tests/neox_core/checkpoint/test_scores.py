"""Scores next to manifests, and what they rank."""

from __future__ import annotations

import math

import pytest
from pydantic import ValidationError

from neox_core.checkpoint.manifest import list_checkpoints
from neox_core.checkpoint.retention import apply_retention
from neox_core.checkpoint.scores import publish_scores, ranking, read_scores
from neox_core.config import EvaluateConfig, GenerationConfig, RunConfig
from neox_core.storage.object_store import ObjectStore
from tests.neox_core.checkpoint.test_retention import PREFIX, config, publish
from tests.neox_core.train.small_training import CONFIG


def scores(bits: float, right: float) -> dict[str, dict[str, object]]:
    return {
        "sums": {"items": 3, "metrics": {"bits_per_byte": {"value": bits}}},
        "facts, written": {"items": 3, "metrics": {"greedy": {"value": right}}},
    }


def test_the_best_is_the_lowest() -> None:
    found = {25: scores(1.5, 0.1), 50: scores(1.0, 0.3), 75: scores(1.2, 0.2), 100: {}}
    assert ranking("sums/bits_per_byte", found) == {25: 1.5, 50: 1.0, 75: 1.2}
    assert ranking("facts, written/greedy", found) == {25: -0.1, 50: -0.3, 75: -0.2}
    assert ranking("facts, written/greedy", {25: scores(1.0, math.nan)}) == {25: math.inf}


def test_the_best_by_a_score_stay_and_so_do_those_without_one(store: ObjectStore) -> None:
    for step in (1, 2, 3, 4, 5):
        publish(store, step)
    for step, bits in ((1, 1.1), (2, 1.0), (3, 1.2)):
        publish_scores(store, PREFIX, f"global_step{step}", scores(bits, 0.0))
    assert sorted(read_scores(store, PREFIX, list_checkpoints(store, PREFIX))) == [1, 2, 3]
    run = config(keep_last=1, keep_best=1, best_by="sums/bits_per_byte")
    apply_retention(store, PREFIX, run, {1: 0.0})
    assert [manifest.step for manifest in list_checkpoints(store, PREFIX)] == [2, 4, 5]
    assert store.list(f"{PREFIX}/global_step1/") == []  # its scores went with it


def test_a_score_that_the_run_does_not_have(tmp_path: object) -> None:
    values = CONFIG.model_dump()
    values["checkpoints"] = {"keep_last": 1, "keep_best": 1, "best_by": "sums/accuracy"}
    with pytest.raises(ValidationError, match="best_by 'sums/accuracy' is no score of this run"):
        RunConfig(**values)
    generate = GenerationConfig(every=1, tasks=("gsm8k_cot",), data="/sets", samples=2)
    assert "gsm8k_cot, written/majority" in EvaluateConfig(generate=generate).scores()
