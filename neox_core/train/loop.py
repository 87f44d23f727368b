"""The training loop: fetch, forward and backward, update, guard, log, validate, save."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from deepspeed.runtime.pipe.engine import PipelineEngine
from torch import Tensor

from neox_core.config import BatchGeometry, TrainConfig
from neox_core.data.dataset import MixtureDataset
from neox_core.data.prefetch import Prefetcher
from neox_core.data.sampler import micro_batch_positions, micro_batches
from neox_core.errors import TrainingError
from neox_core.train.metrics import MetricsLog
from neox_core.train.schedule import learning_rate
from neox_core.train.telemetry import Telemetry

Batches = Iterator[tuple[Tensor | tuple[Tensor, Tensor], Tensor]]
"""Micro batches as the pipeline takes them: inputs [B,T] (with positions within documents [B,T]), targets [B,T]."""


@dataclass(frozen=True)
class Loop:
    """What the loop works with. `save` is called with the step whose state is to be saved."""

    engine: PipelineEngine
    train: TrainConfig
    geometry: BatchGeometry
    data_rank: int
    training_data: MixtureDataset
    validation_data: MixtureDataset
    metrics: MetricsLog
    save: Callable[[int], None]
    telemetry: Telemetry
    heartbeat: Callable[[str], None]
    """Told what begins, so that a hang is noticed."""

    def run(self, start: int) -> None:
        """Train from the state after step `start` to `train.steps`.

        Raises:
            TrainingError: the loss or the gradient norm is not finite; the state is not saved.
        """
        if start == 0:
            self._validate(0)
        with Prefetcher(self._batches(self.training_data, start * self.geometry.sequences)) as prefetched:
            batches = self.telemetry.batches(prefetched)
            for step in range(start + 1, self.train.steps + 1):
                self._step(step, batches)
                if step % self.train.validation.interval == 0 or step == self.train.steps:
                    self._validate(step)
                if step % self.train.checkpoint_interval == 0 or step == self.train.steps:
                    self.heartbeat(f"checkpoint of step {step}")
                    self.save(step)

    def _step(self, step: int, batches: Batches) -> None:
        self.heartbeat(f"step {step}")
        self.telemetry.begin(step, (step - 1) * self.geometry.sequences)
        rate = learning_rate(step, self.train)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        loss = float(self.engine.train_batch(batches))
        norm = float(self.engine.get_global_grad_norm())
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise TrainingError(
                f"step {step}: loss {loss}, gradient norm {norm}. This state is not saved: "
                "run again to resume from the last checkpoint, with a lower learning rate if it happens again"
            )
        self.telemetry.end(
            step,
            {
                "train/loss": loss,
                "train/lr": rate,
                "train/gradient_norm": norm,
                "train/sequences_consumed": step * self.geometry.sequences,
            },
        )

    def _validate(self, step: int) -> None:
        """Mean loss over the first `iterations` global batches of the validation mixture, the same at every step."""
        batches = self._batches(self.validation_data)
        losses = []
        for _ in range(self.train.validation.iterations):
            self.heartbeat(f"validation after step {step}")
            losses.append(float(self.engine.eval_batch(batches)))
        self.metrics.log(step, validation__loss=sum(losses) / len(losses))

    def _batches(self, data: MixtureDataset, consumed: int = 0) -> Batches:
        positions = None
        if self.train.mask_documents:
            positions = micro_batch_positions(data, self.geometry, self.data_rank, consumed)
        return pipeline_batches(micro_batches(data, self.geometry, self.data_rank, consumed), positions)


def pipeline_batches(sequences: Iterator[np.ndarray], positions: Iterator[np.ndarray] | None = None) -> Batches:
    """Cut [B, T+1] sequences into inputs and the targets one position ahead, with [B, T] positions where given."""
    for batch in sequences:
        ids = torch.from_numpy(batch)
        inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
        yield (inputs if positions is None else (inputs, torch.from_numpy(next(positions)))), targets
