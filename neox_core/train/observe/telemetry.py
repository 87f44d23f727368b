"""What is measured of each step, and how it comes to the log without making the device or the host wait.

What is on the device stays there: at a step that is logged, one small all-gather starts to bring the ranks' figures
together; at the next step's end, rank 0 starts a copy to the host; the row is written when a later step finds it done.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from neox_core.config import BatchGeometry, RunConfig
from neox_core.data.mixture import Mixture
from neox_core.parallel.ranks.mesh import Mesh
from neox_core.planning.plan import flops_per_token
from neox_core.train.engine.outcome import applied_of, group_norms_of
from neox_core.train.engine.step_engine import StepEngine
from neox_core.train.observe.figures import Figures, peak_memory
from neox_core.train.observe.metrics import MetricsLog
from neox_core.train.observe.phases import PhaseTimer
from neox_core.train.observe.profiler import StepProfiler
from neox_core.train.observe.source_losses import SourceLosses

Item = TypeVar("Item")
_LOGGING, _WAIT = "logging", "time/data_wait"


class Telemetry:
    """The loop's measurements. A context manager: leaving it writes what is under way.

    Args:
        config: sizes, for FLOPs, and which steps are logged.
        mesh: the grid of ranks.
        geometry: how a global batch is cut.
        engine: what is observed.
        mixture: says which source a sequence comes from.
        metrics: where rows go, on rank 0.
        profiler: begins and ends with each step.
        peak_flops: FLOP/s of all ranks together.
    """

    def __init__(
        self,
        config: RunConfig,
        mesh: Mesh,
        geometry: BatchGeometry,
        engine: StepEngine,
        mixture: Mixture,
        metrics: MetricsLog,
        profiler: StepProfiler,
        peak_flops: float,
    ) -> None:
        self._config, self._mesh, self._tokens = config, mesh, geometry.tokens
        self._metrics, self._profiler, self._peak_flops = metrics, profiler, peak_flops
        self._phases = PhaseTimer(mesh.device)
        self._engine = engine
        self._sources = SourceLosses(mixture, geometry, mesh.data_rank, mesh.device)
        self.attach()
        self._logged = False
        self._steps = self._tokens_done = 0
        self._host_seconds = self._waited = 0.0
        self._gathering: Figures | None = None
        self._under_way: list[Figures] = []

    def __enter__(self) -> Telemetry:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:  # else the device may never come to what is under way
            self.flush()
        else:
            self._write_arrived()

    def attach(self) -> None:
        """Observe the engine's steps from now on, as at first, instead of whoever does."""
        self._engine.observe(self._phases.mark, self._sources.add)

    def use(self, geometry: BatchGeometry, mixture: Mixture) -> None:
        """The steps to come cut their batches like this, from this mixture."""
        self._tokens = geometry.tokens
        self._sources.use(geometry, mixture)

    def batches(self, source: Iterator[Item]) -> Iterator[Item]:
        """What `source` yields, with the time measured that the training waits for it."""
        while True:
            started = time.perf_counter()
            item = next(source, None)
            self._waited += time.perf_counter() - started
            if item is None:
                return
            yield item

    def begin(self, step: int, first_sequence: int) -> None:
        """A step begins, on the global batch that begins with this sequence."""
        self._profiler.begin(step)
        self._logged = step % self._config.train.log_interval == 0 or step == self._config.train.steps
        self._sources.begin(first_sequence)
        self._phases.mark("forward_backward")

    def end(self, step: int, values: Mapping[str, float | Tensor]) -> None:
        """A step has ended. Collective over all ranks at steps that are logged.

        Args:
            values: what the loop knows of the step, by name; numbers, or scalars on the device.
        """
        self._phases.mark(_LOGGING)
        self._steps += 1
        self._tokens_done += self._tokens
        with torch.no_grad():
            self._sources.end(applied_of(self._engine.outcome))
            self._send()
            if self._logged:
                self._gathering = self._gather(step, values)
        self._phases.mark(None)
        self._profiler.end(step)
        started = time.perf_counter()
        if self._gathering is not None and self._logged:
            self._gathering.phases, self._gathering.logging_seconds = self._phases.take(), self._host_seconds
            self._steps, self._tokens_done, self._host_seconds, self._waited = 0, 0, 0.0, 0.0
        self._write_arrived()
        self._host_seconds += time.perf_counter() - started

    def flush(self) -> None:
        """Write the rows that are under way; waits for them."""
        self._send()
        self._write_arrived(wait=True)

    def _gather(self, step: int, values: Mapping[str, float | Tensor]) -> Figures:
        """Start to bring the ranks' figures together."""
        peaks = (self._waited, *peak_memory(self._mesh.device).values())
        own = torch.tensor(peaks, pin_memory=self._mesh.device.type == "cuda")
        sums = self._sources.take()
        figures = torch.cat((sums, own.to(self._mesh.device, non_blocking=True)))
        gathered = figures.new_empty(self._mesh.world_size * figures.numel())
        on_device = {name: value for name, value in values.items() if isinstance(value, Tensor)}
        groups = [f"gradient_norm/{name}" for name in self._engine.gradient_groups]
        on_device |= zip(groups, group_norms_of(self._engine.outcome).unbind(), strict=True)
        return Figures(
            step=step,
            steps=self._steps,
            tokens=self._tokens_done,
            known={name: value for name, value in values.items() if not isinstance(value, Tensor)},
            scalars={name: value.detach().float().view(1) for name, value in on_device.items()},
            sums=sums.numel(),
            gathered=gathered,
            work=dist.all_gather_into_tensor(gathered, figures, async_op=True),
        )

    def _send(self) -> None:
        """Send the figures that have come together meanwhile to the host."""
        figures, self._gathering = self._gathering, None
        if figures is not None:
            figures.send(self._mesh.rank, self._mesh.world_size)
            if self._mesh.rank == 0:
                self._under_way.append(figures)

    def _write_arrived(self, wait: bool = False) -> None:
        while self._under_way and self._under_way[0].arrived(wait):
            figures = self._under_way.pop(0)
            self._metrics.log(figures.step, **self._row(figures))

    def _row(self, figures: Figures) -> dict[str, float]:
        """The values that are logged."""
        others = (_WAIT, *peak_memory(self._mesh.device), *figures.scalars)
        sources = self._sources.names
        sums, tokens, rest = figures.read(len(sources), len(sources), len(others))
        seconds, found = figures.seconds(), dict(zip(others, rest, strict=True))
        step_seconds = sum(seconds.values())
        seconds[_LOGGING] += figures.logging_seconds / figures.steps
        found[_WAIT] /= figures.steps
        losses = {name: total / n for name, total, n in zip(sources, sums, tokens, strict=True) if n}
        return {
            **figures.known,
            **self._speed(figures.tokens / figures.steps / step_seconds),
            **{f"loss/{name}": loss for name, loss in losses.items()},
            **found,
            **{f"time/{phase}": value for phase, value in seconds.items()},
            "time/step": step_seconds,
        }

    def _speed(self, rate: float) -> dict[str, float]:
        model, length = self._config.model, self._config.train.sequence_length
        return {
            "train/tokens_per_second": rate,
            "train/mfu": rate * flops_per_token(model, length) / self._peak_flops,
            "train/mfu_causal": rate * flops_per_token(model, length, causal=True) / self._peak_flops,
        }
