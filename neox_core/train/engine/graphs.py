"""A stage's micro batch as CUDA graphs: recorded once, then started with one call each way, whatever its kernels.

Shapes are static and gradients are added to fixed buffers, so a micro batch is the same work every time. What it reads
and hands on has a place of its own in each slot; a slot is one of the micro batches that a stage has in flight. What
is kept between the passes lies in the slot's memory pool, as large as what the passes need when they run by themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Values = Tensor | tuple[Tensor, ...]
"""What a stage is given or hands on: ids, hidden states, or these with positions within documents."""


@dataclass(frozen=True)
class Work:
    """What is recorded of a stage."""

    forward: Callable[[Values, Tensor | None], Values]
    """(inputs, targets on the last stage) -> results, or the loss that goes backward."""
    backward: Callable[[Values, Tensor | None], None]
    """(results, gradient of the first of them; None for the loss)."""


class RecordedMicroBatch:
    """The two passes of one slot.

    Args:
        work: runs under recording, once.
        inputs, targets: a micro batch; their values do not matter.
        is_last: the results are a loss, which needs no gradient.
        pool: memory of the slot.
        stream: records. Autograd runs on it what was made on it.
    """

    def __init__(
        self, work: Work, inputs: Values, targets: Tensor | None, is_last: bool, pool: Any, stream: torch.cuda.Stream
    ) -> None:
        self.inputs = _map(_place, inputs)
        self._targets = None if targets is None else _place(targets)
        self._forward, self._backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with _recording(self._forward, pool, stream):
            results = work.forward(self.inputs, self._targets)
        self._gradient = None if is_last else torch.empty_like(_first(results))
        with _recording(self._backward, pool, stream):
            work.backward(results, self._gradient)
        self.results = _map(Tensor.detach, results)
        self._gradients = [x.grad for x in _flat(self.inputs)]

    def forward(self, inputs: Values, targets: Tensor | None) -> Values:
        """The results, in place until the slot's next micro batch."""
        for place, given in zip(_flat(self.inputs), _flat(inputs), strict=True):
            place.detach().copy_(given)
        if self._targets is not None and targets is not None:
            self._targets.copy_(targets)
        self._forward.replay()
        return self.results

    def backward(self, gradient: Tensor | None) -> None:
        """Leaves the gradients of the inputs where autograd would."""
        if self._gradient is not None and gradient is not None:
            self._gradient.copy_(gradient)
        self._backward.replay()
        for place, found in zip(_flat(self.inputs), self._gradients, strict=True):
            place.grad = found


def _recording(graph: torch.cuda.CUDAGraph, pool: Any, stream: torch.cuda.Stream) -> torch.cuda.graph:
    # Other threads (NCCL's watchdog, checkpoints' writers) may go on meanwhile.
    return torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local")


def _place(x: Tensor) -> Tensor:
    return torch.empty_like(x).requires_grad_(x.requires_grad) if x.is_floating_point() else x.clone()


def _flat(values: Values) -> tuple[Tensor, ...]:
    return values if isinstance(values, tuple) else (values,)


def _first(values: Values) -> Tensor:
    return _flat(values)[0]


def _map(function: Callable[[Tensor], Tensor], values: Values) -> Values:
    return tuple(map(function, values)) if isinstance(values, tuple) else function(values)


class StageGraphs:
    """All slots of a stage, and when they are recorded.

    Args:
        slots: micro batches in flight.
        work: of a micro batch.
        last_work: of the last one of a step, if it does more; recorded beside in the same memory.
    """

    def __init__(self, slots: int, work: Work, last_work: Work | None, is_last: bool) -> None:
        self._slots, self._work, self._last_work, self._is_last = slots, work, last_work, is_last
        self._stream = torch.cuda.current_stream()
        self._recorded: list[RecordedMicroBatch] = []
        self._last: RecordedMicroBatch | None = None
        self._forwards = self._backwards = 0
        self._count = 0

    @property
    def recorded(self) -> bool:
        return bool(self._recorded)

    def record(self, inputs: Values, targets: Tensor | None, count: int) -> None:
        """Record, with micro batches like this one. Nothing is computed."""
        self._count = count
        pools = [torch.cuda.graph_pool_handle() for _ in range(min(self._slots, count))]

        def new(work: Work, pool: Any) -> RecordedMicroBatch:
            return RecordedMicroBatch(work, inputs, targets, self._is_last, pool, self._stream)

        recorded = [new(self._work, pool) for pool in pools] if count > 1 or self._last_work is None else []
        if self._last_work is not None:
            self._last = new(self._last_work, pools[(count - 1) % len(pools)])
        self._recorded = recorded or [self._last]

    def _slot(self, index: int) -> RecordedMicroBatch:
        if self._last is not None and index == self._count - 1:
            return self._last
        return self._recorded[index % len(self._recorded)]

    def begin(self) -> None:
        self._forwards = self._backwards = 0

    def forward(self, inputs: Values, targets: Tensor | None) -> RecordedMicroBatch:
        slot = self._slot(self._forwards)
        self._forwards += 1
        slot.forward(inputs, targets)
        return slot

    def backward(self, gradient: Tensor | None) -> RecordedMicroBatch:
        slot = self._slot(self._backwards)
        self._backwards += 1
        slot.backward(gradient)
        return slot
