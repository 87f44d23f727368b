"""The fastest layouts: that they fit, that nothing which fits is faster, and Llemma's own next to them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from neox_core.config import RunConfig, batch_geometry, load_config
from neox_core.planning.hardware import CARDS
from neox_core.planning.memory import RESERVED_BYTES
from neox_core.planning.plan import plan
from neox_core.planning.search import REACHED, choice_of, fastest
from neox_core.planning.step_time import predict_run
from tests.paths import CONFIGS, ROOT

A100 = CARDS["a100-40gb"]


def load(name: str) -> RunConfig:
    return load_config(CONFIGS / f"{name}.yml")


@pytest.mark.parametrize("name", ["llemma_7b", "llemma_34b"])
def test_the_fastest_fit_and_beat_llemma(name: str) -> None:
    config = load(name)
    found = fastest(config, A100)
    assert len(found) == 10
    rates = [choice.prediction.tokens_per_second_per_gpu for choice in found]
    assert rates == sorted(rates, reverse=True)
    for choice in found:
        assert choice.memory + RESERVED_BYTES <= A100.memory_gib * 2**30
        assert choice.memory == plan(choice.config, gpu_memory_gib=A100.memory_gib).memory.total
        assert choice.geometry == batch_geometry(choice.config)
        assert choice.geometry.world_size == 256
        assert choice.config.parallel.tensor <= 8
    own = choice_of(config, A100)
    assert own is not None
    assert rates[0] >= own.prediction.tokens_per_second_per_gpu
    assert rates[0] > REACHED[config.model.num_layers, config.model.hidden_size]
    page = (ROOT / "docs" / "performance.md").read_text()
    for rate in (own.prediction.tokens_per_second_per_gpu, rates[0]):
        assert f"{rate:,.0f}" in page, "as the docs say"
    schedules = {(choice.config.parallel.pipeline > 1, choice.config.parallel.pipeline_schedule) for choice in found}
    assert schedules - {(False, "1f1b")} == {(True, "1f1b"), (True, "zb-h1")}


def test_more_memory_is_never_slower_and_too_little_finds_nothing() -> None:
    config = load("llemma_7b")
    first = [fastest(config, replace(A100, memory_gib=size), 2, 1) for size in (24.0, 40.0, 80.0)]
    seconds = [choices[0].prediction.time.total for choices in first]
    assert seconds == sorted(seconds, reverse=True)
    assert fastest(config, replace(A100, memory_gib=5.0), 2) == []
    assert choice_of(config, replace(A100, memory_gib=5.0), 2) is None


@pytest.mark.parametrize("train", [{}, {"activation_checkpointing": "auto"}, {"memory_gib": 30.0}])
def test_what_is_configured_and_what_is_proposed_are_what_the_plan_of_them_says(train: dict[str, object]) -> None:
    config, large = load("llemma_34b"), CARDS["a100-80gb"]
    config = config.model_copy(update={"train": config.train.model_copy(update=train)})
    own = choice_of(config, large)
    assert own is not None
    for choice in (own, *fastest(config, large, count=3)):
        said = plan(choice.config, gpu_memory_gib=large.memory_gib)
        assert (choice.memory, choice.recomputation) == (said.memory.total, said.stages[0].activation_checkpointing)
        assert choice.prediction == predict_run(choice.config, large)


def test_no_layout_fills_more_than_it_is_to() -> None:
    config = load("llemma_7b")
    limited = {"activation_checkpointing": "auto", "memory_gib": 26.0}
    config = config.model_copy(update={"train": config.train.model_copy(update=limited)})
    made = plan(config, gpu_memory_gib=80)
    assert 25 * 2**30 < made.memory.total <= 26 * 2**30
    assert choice_of(config, A100) == choice_of(config, replace(A100, memory_gib=80.0))
    first, second = (fastest(config, replace(A100, memory_gib=size), count=1)[0] for size in (30.0, 80.0))
    assert first.prediction == second.prediction
