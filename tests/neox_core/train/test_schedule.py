"""Every step's learning rate, against DESIGN's formula."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from neox_core.config import TrainChange, TrainConfig, load_config
from neox_core.train.schedule import learning_rate
from tests.paths import CONFIGS

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


def schedule(steps: int, **changes: Any) -> TrainConfig:
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


@pytest.mark.parametrize("shape", ["linear", "1-sqrt"])
@pytest.mark.parametrize(("settings", "first"), [({"decay_share": 0.1}, 900), ({"decay_steps": 250}, 750)])
def test_every_step_of_warmup_stable_decay(shape: str, settings: dict[str, Any], first: int) -> None:
    train = schedule(steps=1000, kind="wsd", warmup_steps=50, decay_shape=shape, min_lr_ratio=0.05, **settings)
    t = np.arange(1, 1001, dtype=np.float64)
    progress = np.clip((t - first) / (1000 - first), 0, 1)
    decay = 1 - (progress if shape == "linear" else np.sqrt(progress))
    expected = train.optimizer.lr * np.where(t <= 50, t / 50, 0.05 + 0.95 * decay)
    np.testing.assert_allclose([learning_rate(step, train) for step in range(1, 1001)], expected, rtol=1e-12, atol=0)
    assert learning_rate(first, train) == train.optimizer.lr
    assert learning_rate(1000, train) == pytest.approx(0.05 * train.optimizer.lr, rel=1e-12)


def test_a_decay_longer_than_the_run_begins_after_the_warmup() -> None:
    train = schedule(steps=100, kind="wsd", warmup_steps=10, decay_steps=1000, decay_shape="linear", min_lr_ratio=0.0)
    assert learning_rate(10, train) == train.optimizer.lr
    assert learning_rate(55, train) == pytest.approx(train.optimizer.lr / 2)


@pytest.mark.parametrize("kind", ["cosine", "wsd"])
def test_a_changed_peak_scales_the_rest_of_the_schedule(kind: str) -> None:
    base = schedule(steps=1000, kind=kind)
    changes = (TrainChange(from_step=300, lr=3e-4), TrainChange(from_step=400, global_batch_tokens=512))
    train = base.model_copy(update={"changes": changes})
    for step in range(1, 1001):
        factor = 1.0 if step < 300 else 3e-4 / base.optimizer.lr
        assert learning_rate(step, train) == pytest.approx(factor * learning_rate(step, base), rel=1e-12)
