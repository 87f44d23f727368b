"""The loop around an engine that only counts."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
import torch

from neox_core.config import (
    BatchGeometry,
    GuardConfig,
    TrainChange,
    TrainConfig,
    ValidationConfig,
    batch_tokens,
    load_config,
)
from neox_core.data.skipped import SkippedSequences
from neox_core.errors import TrainingError
from neox_core.train.engine.outcome import pack_outcome
from neox_core.train.guards import Guard, Incident
from neox_core.train.loop import Loop, pipeline_batches
from neox_core.train.resuming.train_checkpoints import TrainingState
from neox_core.train.schedule import learning_rate
from tests.paths import CONFIGS

GEOMETRY = BatchGeometry(
    world_size=2, data_parallel=2, micro_batch_size=2, accumulation_steps=3, sequences=12, tokens=12 * 4
)
TRAINING, VALIDATION = 0, 1_000_000
"""First id of each dataset."""


class CountingData:
    """Sequence i is [first + 10 i, first + 10 i + 1, ... + 4]."""

    def __init__(self, first: int) -> None:
        self.first, self.mixture = first, None

    def sequences(self, indices: Any) -> Any:
        return self.first + 10 * np.asarray(indices)[:, None] + np.arange(5)


class FakeEngine:
    """Takes batches as a StepEngine does; the losses and norms of the steps are given."""

    def __init__(self, losses: Callable[[int], float], norms: Callable[[int], float]) -> None:
        self.outcome = torch.zeros(0)
        self.rate, self.loss_limit, self.accumulation_steps = 0.0, math.inf, 0
        self.losses, self.norms = losses, norms
        self.trained: list[list[int]] = []
        self.rates: list[float] = []
        self.validated: list[list[int]] = []

    def _take(self, batches: Any, first_id: int, micro_batches: int) -> list[int]:
        """Indices of the sequences of one step, which must come from the dataset that begins with `first_id`."""
        taken = []
        for _ in range(micro_batches):
            inputs, targets = next(batches)
            assert torch.equal(targets, inputs + 1)
            taken += [(int(first) - first_id) // 10 for first in inputs[:, 0]]
        assert all(0 <= index < 1000 for index in taken)
        return taken

    def set_accumulation_steps(self, steps: int, own: int | None = None) -> None:
        self.accumulation_steps = own or steps

    def train_batch(self, batches: Any) -> torch.Tensor:
        self.trained.append(self._take(batches, TRAINING, self.accumulation_steps))
        self.rates.append(self.rate)
        loss, norm = (torch.tensor(values(len(self.trained))) for values in (self.losses, self.norms))
        applied = torch.isfinite(loss) & torch.isfinite(norm) & (loss <= self.loss_limit)
        numbers = torch.stack([loss, norm.square()])
        self.outcome = pack_outcome(applied, numbers, numbers)
        return loss

    def set_learning_rate(self, rate: float) -> None:
        self.rate = rate

    def set_loss_limit(self, limit: float) -> None:
        self.loss_limit = limit

    def eval_batch(self, batches: Any, num_micro_batches: int, own: int | None = None) -> torch.Tensor:
        self.validated.append(self._take(batches, VALIDATION, own or num_micro_batches))
        return torch.tensor(float(len(self.validated)))


class Recorder:
    """What the loop logs and saves, in order. It goes back to what was saved."""

    def __init__(self, start: TrainingState) -> None:
        self.states = [start]
        self.incidents: list[Incident] = []
        self.rows: list[dict[str, float]] = []
        self.saved: list[int] = []
        self.begun: list[tuple[int, int]] = []
        self.flushed = 0

    def log(self, step: int, **values: float) -> None:
        self.rows.append({"step": step, **values})

    def save(self, state: TrainingState, upload: bool = True) -> None:
        self.saved.append(state.step)
        self.states.append(state)

    def go_back(self, incident: Incident) -> TrainingState:
        last = self.states[-1]
        first = (last.step * 12) + sum(window.count for window in last.skipped)
        window = SkippedSequences(last.step, first, incident.batch.first + incident.batch.count - first)
        self.states[-1] = replace(last, skipped=(*last.skipped, window))
        return self.states[-1]

    def use(self, geometry: Any, mixture: Any) -> None:
        pass

    def batches(self, source: Any) -> Any:
        return source

    def begin(self, step: int, first_sequence: int) -> None:
        self.begun.append((step, first_sequence))

    def end(self, step: int, values: dict[str, float]) -> None:
        self.log(step, **{name.replace("/", "__"): value for name, value in values.items()})

    def flush(self) -> None:
        """What was under way; the last step's row is, until then."""
        self.flushed = len(self.rows)

    def steps(self, name: str) -> list[float]:
        return [row["step"] for row in self.rows if name in row]


def train_config(**changes: Any) -> TrainConfig:
    train = load_config(CONFIGS / "toy.yml").train
    changes = {"sequence_length": 4, "global_batch_tokens": 48} | changes
    changes = {"steps": 7, "validation": ValidationConfig(interval=3, iterations=2), "checkpoint_interval": 4} | changes
    return train.model_copy(update=changes)


def run(
    train: TrainConfig,
    start: int | TrainingState = 0,
    losses: Callable[[int], float] = lambda step: 5.0 - step / 10,
    norms: Callable[[int], float] = lambda step: 1.0,
    data_rank: int = 0,
) -> tuple[FakeEngine, Recorder, TrainingError | None]:
    """Losses and norms are those of the engine's first, second, ... batch."""
    if isinstance(start, int):
        start = TrainingState(start, cast(Any, CountingData(TRAINING)))
    engine, recorder = FakeEngine(losses, norms), Recorder(start)
    loop = Loop(
        engine=cast(Any, engine),
        train=train,
        geometry=lambda step: cut(batch_tokens(train, step)),
        data_rank=data_rank,
        validation_data=cast(Any, CountingData(VALIDATION)),
        metrics=cast(Any, recorder),
        guard=Guard(train.guard, engine.set_loss_limit, recorder.incidents.append),
        save=recorder.save,
        stop_due=lambda: None,
        go_back=recorder.go_back,
        telemetry=cast(Any, recorder),
        heartbeat=lambda place: None,
    )
    try:
        loop.run(start)
    except TrainingError as error:
        return engine, recorder, error
    return engine, recorder, None


def cut(tokens: int) -> BatchGeometry:
    """Two data-parallel ranks with micro batches of two sequences."""
    sequences = tokens // 4
    return replace(GEOMETRY, accumulation_steps=sequences // 4, sequences=sequences, tokens=tokens)


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
    assert engine.rates == rates
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


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("what", ["loss", "norm"])
def test_a_number_that_is_not_finite_ends_training_unsaved(bad: float, what: str) -> None:
    def value(step: int) -> float:
        return bad if step == 4 else 2.5

    losses, norms = (value, lambda step: 2.5) if what == "loss" else (lambda step: 2.5, value)
    engine, recorder, error = run(train_config(), losses=losses, norms=norms)
    assert error is not None
    shown = {"loss": 2.5, "norm": 2.5} | {what: bad}
    assert str(error).startswith(
        f"step 4: loss {shown['loss']}, gradient norm {shown['norm']}. The update was not done"
    )
    assert "\n" not in str(error)
    assert recorder.saved == []  # step 4 is one at which to save
    assert len(engine.trained) == 4
    assert recorder.flushed == len(recorder.rows)
    assert [incident.action for incident in recorder.incidents] == ["stop"]


def test_bad_step_is_found_between_logged_ones() -> None:
    _, _, error = run(train_config(log_interval=5), losses=lambda step: math.nan if step == 2 else 1.0)
    assert str(error).startswith("step 2: loss nan")


def test_what_was_done_is_written_where_there_is_nothing_to_go_back_to(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(self: Recorder, incident: Incident) -> TrainingState:
        raise TrainingError("nothing to go back to")

    monkeypatch.setattr(Recorder, "go_back", nothing)
    train = train_config(guard=GuardConfig(on_not_finite="rollback"))
    _, recorder, error = run(train, losses=lambda step: math.nan if step == 2 else 1.0)
    assert str(error) == "nothing to go back to"
    assert recorder.flushed == len(recorder.rows) > 0


def steps_taken(engine: FakeEngine) -> list[int]:
    """The first sequence of each batch, in steps of 12."""
    return [taken[0] // 12 + 1 for taken in engine.trained]


def nan_at(*batches: int) -> Callable[[int], float]:
    return lambda batch: math.nan if batch in batches else 1.0


def test_skipped_steps_are_steps() -> None:
    train = train_config(guard=GuardConfig(on_not_finite="skip", max_skips=2))
    engine, recorder, error = run(train, losses=nan_at(2, 3, 5))
    assert error is None
    assert [(incident.outcome.step, incident.action) for incident in recorder.incidents] == [
        (2, "skip"), (3, "skip"), (5, "skip"),
    ]  # fmt: skip
    assert steps_taken(engine) == [1, 2, 3, 4, 5, 6, 7]
    assert recorder.saved == [4, 7]


def test_too_many_skips_in_a_row_stop() -> None:
    train = train_config(guard=GuardConfig(on_not_finite="skip", max_skips=2))
    _, recorder, error = run(train, losses=nan_at(2, 3, 4))
    assert str(error).startswith("step 4: loss nan, gradient norm 1.0 after train.guard.max_skips 2 skipped steps in")
    assert [incident.action for incident in recorder.incidents] == ["skip", "skip", "stop"]
    assert recorder.saved == []
    # The count goes on where a checkpoint was: step 4 is saved after one skip.
    state = run(train, losses=nan_at(4))[1].states[1]
    assert (state.step, state.guard["skips"]) == (4, 1)
    _, resumed, error = run(train, start=state, losses=nan_at(1, 2))
    assert str(error).startswith("step 6:")
    assert [incident.action for incident in resumed.incidents] == ["skip", "stop"]


def test_rollback_goes_on_after_the_offending_batch_and_repeats_nothing() -> None:
    train = train_config(steps=9, guard=GuardConfig(on_not_finite="rollback", max_rollbacks=2))
    engine, recorder, error = run(train, losses=nan_at(5, 8))
    assert error is None
    # 5 is found bad when 6 is under way; back at 4, training goes on with 6. 7 is found bad before its validation.
    assert steps_taken(engine) == [1, 2, 3, 4, 5, 6, 6, 7, 8, 9, 10, 11, 12]
    rates = [learning_rate(step, train) for step in (1, 2, 3, 4, 5, 6, 5, 6, 5, 6, 7, 8, 9)]
    assert engine.rates == rates
    assert recorder.states[-1].skipped == (SkippedSequences(4, 48, 12), SkippedSequences(4, 60, 24))
    assert recorder.saved == [4, 8, 9]
    assert [row["train__sequences_consumed"] for row in recorder.rows if row.get("train__loss")][-1] == 12 * 12


def test_too_many_rollbacks_stop() -> None:
    train = train_config(guard=GuardConfig(on_not_finite="rollback", max_rollbacks=1))
    _, recorder, error = run(train, losses=nan_at(3, 5))
    assert "after train.guard.max_rollbacks 1 rollbacks" in str(error)
    assert [incident.action for incident in recorder.incidents] == ["rollback", "stop"]


SPIKES = GuardConfig(spike_sigma=4.0, spike_window=3)


def wave(*spikes: int) -> Callable[[int], float]:
    """Losses between 2.0 and 2.2, and 9.0 at spikes."""
    return lambda batch: 9.0 if batch in spikes else 2.0 + (batch % 3) / 10


@pytest.mark.parametrize("action", ["skip", "stop", "rollback"])
def test_spikes(action: Any) -> None:
    train = train_config(steps=12, guard=SPIKES.model_copy(update={"on_spike": action}))
    engine, recorder, error = run(train, losses=wave(7))
    (incident,) = recorder.incidents
    assert (incident.outcome.step, incident.problem, incident.action) == (7, "spike", action)
    losses = [wave()(batch) for batch in (3, 4, 5)]  # what is known when step 7 begins
    assert incident.limit == pytest.approx(np.mean(losses) + 4 * np.std(losses))
    assert (error is not None) is (action == "stop")
    assert math.isfinite(engine.loss_limit)
    assert ("a spike (limit 2.427)" in str(error)) is (action == "stop")


def test_no_spike_before_the_window_is_full_or_without_sigma() -> None:
    assert run(train_config(guard=SPIKES), losses=wave(2, 4))[1].incidents == []
    engine, recorder, _ = run(train_config(steps=12), losses=wave(7))
    assert recorder.incidents == []
    assert engine.loss_limit == math.inf


def test_a_resumed_training_decides_the_same() -> None:
    """Whatever is known when: limits follow from losses up to two steps before, also right after a checkpoint."""
    guard = SPIKES.model_copy(update={"on_spike": "skip", "spike_sigma": 1.0, "max_skips": 100})
    train = train_config(steps=16, guard=guard)

    def losses(after: int) -> Callable[[int], float]:
        return lambda batch: 2.0 + math.sin(7.0 * (after + batch)) / 10

    _, recorder, _ = run(train, losses=losses(0))
    assert len(recorder.incidents) > 3
    for state in recorder.states[1:]:
        stored = replace(state, guard=json.loads(json.dumps(state.guard)))
        _, again, _ = run(train, start=stored, losses=losses(state.step))
        later = [(i.outcome, i.limit) for i in recorder.incidents if i.outcome.step > state.step]
        assert [(i.outcome, i.limit) for i in again.incidents] == later


def test_changes_of_learning_rate_and_batch() -> None:
    changes = (
        TrainChange(from_step=3, lr=1e-4),
        TrainChange(from_step=4, global_batch_tokens=96),
        TrainChange(from_step=6, global_batch_tokens=16, lr=5e-4),
    )
    train = train_config(changes=changes)
    engine, recorder, _ = run(train)
    firsts = [taken[0] for taken in engine.trained]
    assert firsts == [0, 12, 24, 36, 60, 84, 88]
    assert [len(taken) for taken in engine.trained] == [6, 6, 6, 12, 12, 2, 2]
    base, peak = train.model_copy(update={"changes": ()}), train.optimizer.lr
    factors = [1, 1, 1e-4 / peak, 1e-4 / peak, 1e-4 / peak, 5e-4 / peak, 5e-4 / peak]
    for step, (factor, rate) in enumerate(zip(factors, engine.rates, strict=True), start=1):
        assert rate == pytest.approx(factor * learning_rate(step, base), rel=1e-12)
    assert [row["train__sequences_consumed"] for row in recorder.rows if "train__loss" in row] == [
        12, 24, 36, 60, 84, 88, 92,
    ]  # fmt: skip
    # Validation keeps its batch, so that its losses can be compared.
    assert {len(taken) for taken in engine.validated} == {6}
    resumed, _, _ = run(train, start=5)
    assert resumed.trained == engine.trained[5:]


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
