"""The training loop: fetch, forward and backward, update, guard, log, validate, save."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from neox_core.config import BatchGeometry, TrainConfig
from neox_core.data.dataset import MixtureDataset
from neox_core.data.prefetch import Prefetcher
from neox_core.data.sampler import micro_batch_positions, micro_batches
from neox_core.data.skipped import first_sequence
from neox_core.errors import TrainingError
from neox_core.train.ends.stopping import Stop, StopAtBoundary
from neox_core.train.engine.outcome import gradient_norm_of
from neox_core.train.engine.step_engine import Batches, StepEngine
from neox_core.train.guards import Batch, Guard, Incident, RollBackError
from neox_core.train.observe.metrics import MetricsLog
from neox_core.train.observe.telemetry import Telemetry
from neox_core.train.resuming.train_checkpoints import TrainingState
from neox_core.train.schedule import learning_rate


@dataclass(frozen=True)
class Loop:
    """What the loop works with."""

    engine: StepEngine
    train: TrainConfig
    geometry: Callable[[int], BatchGeometry]
    """How a step's batch is cut."""
    data_rank: int
    validation_data: MixtureDataset
    metrics: MetricsLog
    guard: Guard
    save: Callable[[TrainingState, bool], None]
    """Called with a state, and whether it is to go to the store."""
    stop_due: Callable[[], Stop | None]
    """Called at each step's boundary on all ranks, which get the same answer."""
    go_back: Callable[[Incident], TrainingState]
    """Loads the state to go on from after an incident."""
    telemetry: Telemetry
    heartbeat: Callable[[str], None]
    """Called with what begins, so that a hang is noticed."""

    def run(self, state: TrainingState) -> None:
        """Train from a state to `train.steps`.

        Raises:
            TrainingError: the guard stops training; the state is not saved.
            StopAtBoundary: training was told to stop; the state is saved, unless another job is at work.
        """
        if state.step == 0:
            self._validate(0)
        try:
            while state.step < self.train.steps:
                state = self._train_or_go_back(state)
        except TrainingError:
            self.telemetry.flush()  # all ranks stop at the same step, so what is under way arrives
            raise

    def _train_or_go_back(self, state: TrainingState) -> TrainingState:
        self.guard.restore(state.guard, len(state.skipped))
        try:
            return self._train(state)
        except RollBackError as error:
            self.heartbeat(f"rollback after step {error.incident.outcome.step}")
            return self.go_back(error.incident)

    def _train(self, state: TrainingState) -> TrainingState:
        """Train as long as the batch keeps its size."""
        begin, data = state.step + 1, state.data
        changes = [change.from_step for change in self.train.changes if change.from_step > begin]
        last = min([self.train.steps, *(step - 1 for step in changes)])
        geometry, first = self.geometry(begin), first_sequence(self.train, begin, state.skipped)
        own = geometry.micro_batches_of(self.data_rank)
        self.engine.set_accumulation_steps(geometry.accumulation_steps, own)
        self.telemetry.use(geometry, data.mixture)
        with Prefetcher(self._batches(data, geometry, first)) as prefetched:
            batches = self.telemetry.batches(prefetched)
            for step in range(begin, last + 1):
                self._step(step, batches, Batch(data, first, geometry.sequences))
                first += geometry.sequences
                state = replace(state, step=step)
                saved = self._between(state)
                if (stop := self.stop_due()) and step < self.train.steps:
                    self._stop(state, stop, saved)
        self.guard.drain()
        return replace(state, guard=self.guard.state())

    def _step(self, step: int, batches: Batches, batch: Batch) -> None:
        self.heartbeat(f"step {step}")
        self.telemetry.begin(step, batch.first)
        rate = learning_rate(step, self.train)
        self.engine.set_learning_rate(rate)
        self.guard.begin(step)
        values: dict[str, float | Tensor] = {
            "train/loss": self.engine.train_batch(batches),
            "train/gradient_norm": gradient_norm_of(self.engine.outcome),
            "train/lr": rate,
            "train/sequences_consumed": batch.first + batch.count,
        }
        self.telemetry.end(step, values)
        self.guard.end(step, self.engine.outcome, batch)

    def _between(self, state: TrainingState) -> bool:
        """Validate and save, where that is due after a step. Whether it was saved."""
        step, last = state.step, state.step == self.train.steps
        validate, save = (
            last or step % n == 0 for n in (self.train.validation.interval, self.train.checkpoint_interval)
        )
        if validate or save:
            self.guard.drain()
        if validate:
            self._validate(step)
        if save:
            self.heartbeat(f"checkpoint of step {step}")
            self.save(replace(state, guard=self.guard.state()), True)
        return save

    def _stop(self, state: TrainingState, stop: Stop, saved: bool) -> None:
        """Save, unless that was done, or another job saves now; without the store if it was given up."""
        self.guard.drain()
        upload = stop.kind != "storage"
        if stop.kind != "superseded" and not (saved and upload):
            self.heartbeat(f"checkpoint of step {state.step}")
            self.save(replace(state, guard=self.guard.state()), upload)
        self.telemetry.flush()
        raise StopAtBoundary(stop, state.step)

    def _validate(self, step: int) -> None:
        """Mean loss over the first `iterations` global batches of the validation mixture, the same at every step."""
        geometry = self.geometry(1)
        count, own = geometry.accumulation_steps, geometry.micro_batches_of(self.data_rank)
        batches = self._batches(self.validation_data, geometry)
        losses = []
        for _ in range(self.train.validation.iterations):
            self.heartbeat(f"validation after step {step}")
            losses.append(float(self.engine.eval_batch(batches, num_micro_batches=count, own=own)))
        self.metrics.log(step, validation__loss=sum(losses) / len(losses))

    def _batches(self, data: MixtureDataset, geometry: BatchGeometry, consumed: int = 0) -> Batches:
        positions = None
        if self.train.mask_documents:
            positions = micro_batch_positions(data, geometry, self.data_rank, consumed)
        return pipeline_batches(micro_batches(data, geometry, self.data_rank, consumed), positions)


def pipeline_batches(sequences: Iterator[np.ndarray], positions: Iterator[np.ndarray] | None = None) -> Batches:
    """Cut [B, T+1] sequences into inputs and the targets one position ahead, with [B, T] positions where given."""
    for batch in sequences:
        ids = torch.from_numpy(batch)
        inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
        yield (inputs if positions is None else (inputs, torch.from_numpy(next(positions)))), targets
