"""Every step's learning rate, against DESIGN's formula."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from neox_core.config import TrainConfig, load_config
from neox_core.train.schedule import learning_rate

CONFIGS = Path(__file__).parents[3] / "configs"
RUNS = [("llemma_7b", 1e-4, 48_000), ("llemma_34b", 5e-5, 12_000)]


@pytest.mark.parametrize(("name", "peak", "steps"), RUNS)
def test_every_step_of_the_published_runs(name: str, peak: float, steps: int) -> None:
    train = load_config(CONFIGS / f"{name}.yml").train
    assert train.steps == steps
    t = np.arange(1, steps + 1, dtype=np.float64)
    cosine = 0.5 * (1 + np.cos(np.pi * (t - 500) / (steps - 500)))
    expected = np.where(t <= 500, peak * t / 500, peak * (0.033 + (1 - 0.033) * cosine))
    found = [learning_rate(step, train) for step in range(1, steps + 1)]
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("name", "peak", "steps"), RUNS)
def test_landmarks(name: str, peak: float, steps: int) -> None:
    train = load_config(CONFIGS / f"{name}.yml").train
    assert learning_rate(1, train) == pytest.approx(peak / 500)
    assert learning_rate(250, train) == pytest.approx(peak / 2)
    assert learning_rate(500, train) == peak
    assert learning_rate(501, train) < peak
    assert learning_rate(500 + (steps - 500) // 2, train) == pytest.approx(peak * (1 + 0.033) / 2)
    assert learning_rate(steps, train) == pytest.approx(0.033 * peak, rel=1e-12)
    assert learning_rate(steps - 1, train) > learning_rate(steps, train)


def schedule(steps: int, **changes: float) -> TrainConfig:
    train = load_config(CONFIGS / "toy.yml").train
    return train.model_copy(update={"steps": steps, "schedule": train.schedule.model_copy(update=changes)})


def test_past_the_decays_end_the_floor_stays() -> None:
    train = schedule(steps=1000, warmup_steps=10, decay_steps=100, min_lr_ratio=0.1)
    peak = train.optimizer.lr
    assert learning_rate(99, train) > 0.1 * peak
    assert learning_rate(100, train) == pytest.approx(0.1 * peak)
    assert {learning_rate(step, train) for step in (101, 500, 1000, 100_000)} == {learning_rate(100, train)}


def test_no_warmup_starts_just_below_the_peak() -> None:
    train = schedule(steps=100, warmup_steps=0)
    assert 0.99 * train.optimizer.lr < learning_rate(1, train) < train.optimizer.lr


def test_a_run_that_ends_within_its_warmup() -> None:
    train = schedule(steps=5, warmup_steps=10)
    assert [learning_rate(step, train) / train.optimizer.lr for step in range(1, 6)] == pytest.approx(
        [0.1, 0.2, 0.3, 0.4, 0.5]
    )
