"""What is measured of each step, and how it comes to the log without making the device or the host wait.

On the device everything stays there: at a step that is logged, one small all-gather brings the ranks' figures together
and rank 0 starts a copy to the host. The row is written when a later step finds the copy done.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from neox_core.config import BatchGeometry, RunConfig
from neox_core.data.mixture import Mixture
from neox_core.parallel.mesh import Mesh
from neox_core.plan import flops_per_token
from neox_core.train.gradient_norms import GradientNorms
from neox_core.train.metrics import MetricsLog
from neox_core.train.phases import Event, Phases, PhaseTimer, hook_phases, new_event
from neox_core.train.profiler import StepProfiler
from neox_core.train.source_losses import SourceLosses

Item = TypeVar("Item")
_GIB = 2**30
_LOGGING, _WAIT = "logging", "time/data_wait"
_LOSS_SUM, _TOKENS, _SQUARE = "sum of losses", "tokens", "square"


@dataclass(frozen=True)
class _Row:
    """A step whose figures are on their way to the host."""

    step: int
    steps: int
    """How many steps the phases and sums are of."""
    phases: Phases
    logging_seconds: float
    """Spent by the host outside of the phases."""
    known: Mapping[str, float]
    """What the host knew at once."""
    names: tuple[str, ...]
    figures: Tensor
    """Values of `names`, on the host when `copied` has passed."""
    copied: Event


class Telemetry:
    """The loop's measurements. A context manager: leaving it writes what is under way.

    Args:
        config: sizes, for FLOPs, and which steps are logged.
        mesh: the grid of ranks.
        geometry: how a global batch is cut.
        engine: DeepSpeed's pipeline engine, which is hooked.
        mixture: says which source a sequence comes from.
        metrics: where rows go, on rank 0.
        profiler: told of each step.
        peak_flops: FLOP/s of all ranks together.
    """

    def __init__(
        self,
        config: RunConfig,
        mesh: Mesh,
        geometry: BatchGeometry,
        engine: Any,
        mixture: Mixture,
        metrics: MetricsLog,
        profiler: StepProfiler,
        peak_flops: float,
    ) -> None:
        self._config, self._mesh, self._tokens = config, mesh, geometry.tokens
        self._metrics, self._profiler, self._peak_flops = metrics, profiler, peak_flops
        self._phases = PhaseTimer(mesh.device)
        self._norms = GradientNorms(engine.module, engine.optimizer, config.model, mesh)
        self._sources = SourceLosses(mixture, geometry, mesh.data_rank, mesh.device)
        if engine.is_last_stage() and mesh.tensor_rank == 0:
            engine.module.loss_fn.on_token_losses = self._sources.add
        hook_phases(engine, lambda: self._phases.mark("reduce"), self._before_update)
        self._logged = False
        self._squares: Tensor | None = None
        self._steps = 0
        self._host_seconds = self._waited = 0.0
        self._under_way: list[_Row] = []

    def __enter__(self) -> Telemetry:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:  # else the device may never come to what is under way
            self.flush()
        else:
            self._write_passed()

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
        with torch.no_grad():
            self._sources.end()
            figures = self._gather(values) if self._logged else None
        self._phases.mark(None)
        self._profiler.end(step)
        started = time.perf_counter()
        if self._logged:
            phases = self._phases.take()
            if figures is not None:
                known = {name: value for name, value in values.items() if not isinstance(value, Tensor)}
                self._under_way.append(_Row(step, self._steps, phases, self._host_seconds, known, *figures))
            self._steps, self._host_seconds, self._waited = 0, 0.0, 0.0
        self._write_passed()
        self._host_seconds += time.perf_counter() - started

    def flush(self) -> None:
        """Write the rows that are under way; waits for them."""
        for row in self._under_way:
            row.phases.wait()
            row.copied.synchronize()
        self._write_passed()

    def _before_update(self) -> None:
        self._phases.mark(_LOGGING)
        if self._logged:
            self._squares = self._norms.squares()
        self._phases.mark("optimizer")

    def _gather(self, values: Mapping[str, float | Tensor]) -> tuple[tuple[str, ...], Tensor, Event] | None:
        """Bring the ranks' figures together; on rank 0, start their way to the host: their names, values, arrival."""
        assert self._squares is not None, "the engine did not come to its update"
        peaks = {_WAIT: self._waited, **_memory(self._mesh.device)}
        own = torch.tensor(list(peaks.values()), pin_memory=self._mesh.device.type == "cuda")
        sums = torch.cat((self._sources.take(), self._squares))
        figures = torch.cat((sums, own.to(self._mesh.device, non_blocking=True)))
        gathered = figures.new_empty(self._mesh.world_size * figures.numel())
        dist.all_gather_into_tensor(gathered, figures)
        if self._mesh.rank != 0:
            return None
        everywhere = gathered.view(self._mesh.world_size, -1)
        scalars = {name: value.detach().float().view(1) for name, value in values.items() if isinstance(value, Tensor)}
        size = sums.numel()
        figures = torch.cat((everywhere[:, :size].sum(0), everywhere[:, size:].amax(0), *scalars.values()))
        names = (
            *(f"{kind}/{name}" for kind in (_LOSS_SUM, _TOKENS) for name in self._sources.names),
            *(f"{_SQUARE}/{name}" for name in self._norms.names),
            *peaks,
            *scalars,
        )
        host = torch.empty(figures.shape, pin_memory=figures.is_cuda)
        host.copy_(figures, non_blocking=True)
        copied = new_event(figures.device)
        copied.record()
        return names, host, copied

    def _write_passed(self) -> None:
        while self._under_way and self._under_way[0].copied.query() and self._under_way[0].phases.passed():
            row = self._under_way.pop(0)
            self._metrics.log(row.step, **self._read(row))

    def _read(self, row: _Row) -> dict[str, float]:
        """The row's values as they are logged."""
        found = dict(zip(row.names, row.figures.tolist(), strict=True))
        sums = {name: found.pop(f"{_LOSS_SUM}/{name}") for name in self._sources.names}
        tokens = {name: found.pop(f"{_TOKENS}/{name}") for name in self._sources.names}
        squares = {name: found.pop(f"{_SQUARE}/{name}") for name in self._norms.names}
        seconds = {name: total / row.steps for name, total in row.phases.seconds().items()}
        step_seconds = sum(seconds.values())
        seconds[_LOGGING] += row.logging_seconds / row.steps
        found[_WAIT] /= row.steps
        return {
            **row.known,
            **self._speed(step_seconds),
            **{f"loss/{name}": sums[name] / count for name, count in tokens.items() if count},
            **{f"gradient_norm/{name}": square**0.5 for name, square in squares.items()},
            **found,
            **{f"time/{phase}": value for phase, value in seconds.items()},
            "time/step": step_seconds,
        }

    def _speed(self, seconds: float) -> dict[str, float]:
        model, length = self._config.model, self._config.train.sequence_length
        rate = self._tokens / seconds
        return {
            "train/tokens_per_second": rate,
            "train/mfu": rate * flops_per_token(model, length) / self._peak_flops,
            "train/mfu_causal": rate * flops_per_token(model, length, causal=True) / self._peak_flops,
        }


def _memory(device: torch.device) -> dict[str, float]:
    """Peaks so far, in GiB, by name."""
    if device.type == "cuda":
        allocated, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
        return {"memory/allocated_gib": allocated / _GIB, "memory/reserved_gib": reserved / _GIB}
    return {"memory/resident_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / _GIB}
