"""The loop around an engine that only counts."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from neox_core.config import BatchGeometry, TrainConfig, ValidationConfig, load_config
from neox_core.errors import TrainingError
from neox_core.train.loop import Loop, pipeline_batches
from neox_core.train.schedule import learning_rate

GEOMETRY = BatchGeometry(
    world_size=2, data_parallel=2, micro_batch_size=2, accumulation_steps=3, sequences=12, tokens=12 * 4
)
TRAINING, VALIDATION = 0, 1_000_000
"""First id of each dataset."""


class CountingData:
    """Sequence i is [first + 10 i, first + 10 i + 1, ... + 4]."""

    def __init__(self, first: int) -> None:
        self.first = first

    def sequences(self, indices: Any) -> Any:
        return self.first + 10 * np.asarray(indices)[:, None] + np.arange(5)


class FakeEngine:
    """Takes batches as DeepSpeed's engine does; the losses and norms of the steps are given."""

    def __init__(self, losses: Callable[[int], float], norms: Callable[[int], float]) -> None:
        self.optimizer = SimpleNamespace(param_groups=[{"lr": 0.0}, {"lr": 0.0}])
        self.losses, self.norms = losses, norms
        self.trained: list[list[int]] = []
        self.rates: list[tuple[float, ...]] = []
        self.validated: list[list[int]] = []

    def _take(self, batches: Any, first_id: int) -> list[int]:
        """Indices of the sequences of one step, which must come from the dataset that begins with `first_id`."""
        taken = []
        for _ in range(GEOMETRY.accumulation_steps):
            inputs, targets = next(batches)
            assert torch.equal(targets, inputs + 1)
            taken += [(int(first) - first_id) // 10 for first in inputs[:, 0]]
        assert all(0 <= index < 1000 for index in taken)
        return taken

    def train_batch(self, batches: Any) -> torch.Tensor:
        self.trained.append(self._take(batches, TRAINING))
        self.rates.append(tuple(group["lr"] for group in self.optimizer.param_groups))
        return torch.tensor(self.losses(len(self.trained)))

    def get_global_grad_norm(self) -> float:
        return self.norms(len(self.trained))

    def eval_batch(self, batches: Any) -> torch.Tensor:
        self.validated.append(self._take(batches, VALIDATION))
        return torch.tensor(float(len(self.validated)))


class Recorder:
    """What the loop logs and saves, in order."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        self.saved: list[int] = []
        self.begun: list[tuple[int, int]] = []

    def log(self, step: int, **values: float) -> None:
        self.rows.append({"step": step, **values})

    def batches(self, source: Any) -> Any:
        return source

    def begin(self, step: int, first_sequence: int) -> None:
        self.begun.append((step, first_sequence))

    def end(self, step: int, values: dict[str, float]) -> None:
        self.log(step, **{name.replace("/", "__"): value for name, value in values.items()})

    def steps(self, name: str) -> list[float]:
        return [row["step"] for row in self.rows if name in row]


def train_config(**changes: Any) -> TrainConfig:
    train = load_config(Path(__file__).parents[3] / "configs/toy.yml").train
    changes = {"steps": 7, "validation": ValidationConfig(interval=3, iterations=2), "checkpoint_interval": 4} | changes
    return train.model_copy(update=changes)


def run(
    train: TrainConfig,
    start: int = 0,
    losses: Callable[[int], float] = lambda step: 5.0 - step / 10,
    norms: Callable[[int], float] = lambda step: 1.0,
    data_rank: int = 0,
) -> tuple[FakeEngine, Recorder, TrainingError | None]:
    engine, recorder = FakeEngine(losses, norms), Recorder()
    loop = Loop(
        engine=engine,
        train=train,
        geometry=GEOMETRY,
        data_rank=data_rank,
        training_data=cast(Any, CountingData(TRAINING)),
        validation_data=cast(Any, CountingData(VALIDATION)),
        metrics=cast(Any, recorder),
        save=recorder.saved.append,
        telemetry=cast(Any, recorder),
        heartbeat=lambda place: None,
    )
    try:
        loop.run(start)
    except TrainingError as error:
        return engine, recorder, error
    return engine, recorder, None


def test_when_to_validate_and_to_save() -> None:
    engine, recorder, _ = run(train_config())
    assert len(engine.trained) == 7
    assert recorder.steps("validation__loss") == [0, 3, 6, 7]
    assert recorder.saved == [4, 7]
    assert recorder.steps("train__loss") == [1, 2, 3, 4, 5, 6, 7]


def test_last_step_is_saved_and_validated_once() -> None:
    _, recorder, _ = run(train_config(steps=12))
    assert recorder.steps("validation__loss") == [0, 3, 6, 9, 12]
    assert recorder.saved == [4, 8, 12]


def test_rows() -> None:
    train = train_config()
    engine, recorder, _ = run(train, norms=lambda step: step / 2)
    rates = [learning_rate(step, train) for step in range(1, 8)]
    assert engine.rates == [(rate, rate) for rate in rates]
    for step, row in enumerate((row for row in recorder.rows if "train__loss" in row), start=1):
        assert row["train__loss"] == pytest.approx(5.0 - step / 10)
        assert row["train__lr"] == rates[step - 1]
        assert row["train__gradient_norm"] == step / 2
        assert row["train__sequences_consumed"] == 12 * step
    # Mean over the iterations: the engine's evaluations count up.
    assert [row["validation__loss"] for row in recorder.rows if "validation__loss" in row] == [1.5, 3.5, 5.5, 7.5]


def test_telemetry_hears_which_sequences_a_step_takes() -> None:
    _, recorder, _ = run(train_config(), start=4)
    assert recorder.begun == [(5, 48), (6, 60), (7, 72)]


@pytest.mark.parametrize("data_rank", [0, 1])
def test_each_step_takes_the_next_global_batch(data_rank: int) -> None:
    engine, _, _ = run(train_config(), data_rank=data_rank)
    for step, taken in enumerate(engine.trained):
        micro_batches = np.arange(12 * step, 12 * (step + 1)).reshape(3, 2, 2)  # accumulation, data rank, micro batch
        assert taken == micro_batches[:, data_rank].flatten().tolist()


def test_validation_takes_nothing_from_training_and_is_the_same_each_time() -> None:
    often, _, _ = run(train_config(validation=ValidationConfig(interval=1, iterations=3)))
    seldom, _, _ = run(train_config(validation=ValidationConfig(interval=100, iterations=1)))
    assert often.trained == seldom.trained
    assert len(often.validated) == 8 * 3
    assert {tuple(map(tuple, often.validated[i : i + 3])) for i in range(0, 24, 3)} == {
        tuple(map(tuple, often.validated[:3]))
    }
    assert often.validated[0] != often.validated[1]


def test_resuming_goes_on_where_it_stopped() -> None:
    train = train_config()
    whole, _, _ = run(train)
    rest, recorder, _ = run(train, start=4)
    assert rest.trained == whole.trained[4:]
    assert rest.rates == whole.rates[4:]
    assert recorder.saved == [7]
    assert recorder.steps("validation__loss") == [6, 7]
    assert recorder.steps("train__loss") == [5, 6, 7]


def test_resuming_a_finished_run_does_nothing() -> None:
    engine, recorder, _ = run(train_config(), start=7)
    assert (engine.trained, engine.validated, recorder.rows, recorder.saved) == ([], [], [], [])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("what", ["loss", "norm"])
def test_a_number_that_is_not_finite_ends_training_unsaved(bad: float, what: str) -> None:
    def value(step: int) -> float:
        return bad if step == 4 else 2.5

    losses, norms = (value, lambda step: 2.5) if what == "loss" else (lambda step: 2.5, value)
    engine, recorder, error = run(train_config(), losses=losses, norms=norms)
    assert error is not None
    shown = {"loss": 2.5, "norm": 2.5} | {what: bad}
    assert str(error).startswith(f"step 4: loss {shown['loss']}, gradient norm {shown['norm']}.")
    assert "\n" not in str(error)
    assert recorder.saved == []  # step 4 is one at which to save
    assert len(engine.trained) == 4
    assert recorder.steps("train__loss") == [1, 2, 3]


def test_bad_step_is_found_between_logged_ones() -> None:
    _, _, error = run(train_config(log_interval=5), losses=lambda step: math.nan if step == 2 else 1.0)
    assert str(error).startswith("step 2: loss nan")


def test_pipeline_batches_are_shifted_by_one() -> None:
    inputs, targets = next(pipeline_batches(iter([np.array([[3, 1, 4, 1], [5, 9, 2, 6]])])))
    assert inputs.tolist() == [[3, 1, 4], [5, 9, 2]]
    assert targets.tolist() == [[1, 4, 1], [9, 2, 6]]
    assert inputs.is_contiguous()
    assert targets.is_contiguous()


def test_a_restart_at_any_step_takes_the_same_batches_and_leaves_no_thread() -> None:
    """Batches are read ahead: what was read and not trained on when a job ended must come again."""
    for start in range(7):
        for data_rank in (0, 1):
            rest, _, _ = run(train_config(checkpoint_interval=1), start=start, data_rank=data_rank)
            expected, _, _ = run(train_config(checkpoint_interval=1), data_rank=data_rank)
            assert rest.trained == expected.trained[start:]
    assert not [thread for thread in threading.enumerate() if thread.name == "prefetch"]
