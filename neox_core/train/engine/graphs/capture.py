"""A stage's micro batches as CUDA graphs: each pass is recorded once and then started by one call.

Shapes are static and gradients are added to fixed buffers, so every micro batch is the same work on the same memory.
What it reads and hands on has a place of its own in each slot; a slot is one of the micro batches that a stage has in
flight at a time. What is kept between the passes lies in the slot's memory pool, which is as large as what the passes
need without graphs. Recording computes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

Values = Tensor | tuple[Tensor, ...]
"""What a stage is given or hands on: ids or hidden states [B,T,...], alone or with positions within documents [B,T]."""


@dataclass(frozen=True)
class Passed:
    """What a forward pass gives."""

    results: Values
    """Hidden states for the next stage; on the last stage, the loss that goes backward."""
    report: tuple[Tensor, ...] = ()
    """Tensors for whoever observes the micro batch."""


@dataclass(frozen=True)
class Work:
    """The passes of a micro batch."""

    forward: Callable[[Values, Tensor | None], Passed]
    """(inputs, targets on the last stage) -> what they give."""
    backward: Callable[[Values, Tensor | None], None]
    """(results, the gradient of the first of them, or None for a loss) -> gradients in buffers and at the inputs."""
    weights: Callable[[], None] | None = None
    """Adds the weights' gradients that `backward` deferred; None: it adds them itself."""


class Graph(Protocol):
    """Work that was recorded."""

    def replay(self) -> None:
        """Do it, in the current stream's order."""


class Recorder(Protocol):
    """Records work in one memory pool."""

    def record(self, work: Callable[[], None]) -> Graph:
        """Call the function, whose kernels are not run but kept."""


class CudaRecorder:
    """Records with CUDA's stream capture, on the current stream.

    That may not be the default stream, on which nothing can be recorded; nor may autograd's nodes that sum up
    parameters' gradients have been made on another one, where the backward pass would run them (see init_distributed).

    Args:
        rejoin: has the current stream wait for the others that work uses. Called where work fails, since CUDA cannot
            end a recording that has left the current stream.
    """

    def __init__(self, rejoin: Callable[[], None]) -> None:
        self._pool, self._rejoin = torch.cuda.graph_pool_handle(), rejoin

    def record(self, work: Callable[[], None]) -> Graph:
        """Other threads may use the device meanwhile, as NCCL's watchdog does."""
        graph, failure = torch.cuda.CUDAGraph(), None
        stream = torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph, self._pool, stream, capture_error_mode="thread_local"):
                try:
                    work()
                except RuntimeError as error:
                    failure = error
                    self._rejoin()
        except RuntimeError as error:
            self._close_pool()
            failure = failure or error
        if failure is not None:
            raise failure
        return graph

    def _close_pool(self) -> None:
        """Where CUDA refuses to end a recording, torch 2.11 leaves its memory pool open, and then never again gives
        cached memory back to make room."""
        device = torch.cuda.current_device()
        with suppress(RuntimeError):  # it is closed
            torch._C._cuda_endAllocateToPool(device, self._pool)
            torch._C._cuda_releasePool(device, self._pool)


class RecordedMicroBatch:
    """The passes of one slot.

    Args:
        work: what is recorded.
        inputs, targets: a micro batch, for its shapes; on the last stage with targets, whose results are a loss.
        recorder: records both passes.
    """

    passed: Passed
    """In place until the next micro batch of the slot."""

    def __init__(self, work: Work, inputs: Values, targets: Tensor | None, recorder: Recorder) -> None:
        self._work = work
        self.inputs = _map(_place, inputs)
        """Their gradients are at `grad` after a backward pass."""
        self._targets = None if targets is None else torch.zeros_like(targets)
        self._forward = recorder.record(self._run_forward)
        self._gradient = torch.empty_like(flat(self.passed.results)[0]) if targets is None else None
        self._backward = recorder.record(self._run_backward)
        self._weights = None if work.weights is None else recorder.record(work.weights)
        # The graph that autograd made is of no further use.
        results, report = self.passed.results, self.passed.report
        self.passed = Passed(_map(Tensor.detach, results), tuple(x.detach() for x in report))

    def _run_forward(self) -> None:
        self.passed = self._work.forward(self.inputs, self._targets)

    def _run_backward(self) -> None:
        for place in flat(self.inputs):
            place.grad = None
        self._work.backward(self.passed.results, self._gradient)
        self._input_gradients = [place.grad for place in flat(self.inputs)]

    def forward(self, inputs: Values, targets: Tensor | None) -> Passed:
        """Compute a micro batch of the same shapes."""
        for place, given in zip(flat(self.inputs), flat(inputs), strict=True):
            place.detach().copy_(given)
        if self._targets is not None and targets is not None:
            self._targets.copy_(targets)
        self._forward.replay()
        return self.passed

    def backward(self, gradient: Tensor | None) -> None:
        """Go back through it.

        Args:
            gradient: of the first result; None for a loss.
        """
        if self._gradient is not None and gradient is not None:
            self._gradient.copy_(gradient)
        self._backward.replay()
        for place, found in zip(flat(self.inputs), self._input_gradients, strict=True):
            place.grad = found

    def add_weight_gradients(self) -> None:
        """Those that the backward pass deferred."""
        assert self._weights is not None, "recorded with work that defers them"
        self._weights.replay()


class StageGraphs:
    """The slots of a stage.

    Args:
        work: of a micro batch.
        last_work: of a step's last micro batch, where it does more.
        inputs, targets: see RecordedMicroBatch.
        count: micro batches of a step.
        in_flight: micro batches that the stage has in flight, at most.
        new_recorder: makes one for each slot.
    """

    def __init__(
        self,
        work: Work,
        last_work: Work | None,
        inputs: Values,
        targets: Tensor | None,
        count: int,
        in_flight: int,
        new_recorder: Callable[[], Recorder],
    ) -> None:
        recorders = [new_recorder() for _ in range(min(in_flight, count))]
        self._count = count
        self._slots = [
            RecordedMicroBatch(work, inputs, targets, recorder)
            for index, recorder in enumerate(recorders)
            if last_work is None or index < count - 1
        ]
        self._last = None
        if last_work is not None:
            # In the memory of the slot whose turn it is, which is not in flight then.
            recorder = recorders[(count - 1) % len(recorders)]
            self._last = RecordedMicroBatch(last_work, inputs, targets, recorder)

    def slot(self, micro_batch: int) -> RecordedMicroBatch:
        """Of a micro batch of the step, from 0: first in, first out."""
        if self._last is not None and micro_batch == self._count - 1:
            return self._last
        return self._slots[micro_batch % len(self._slots)]


def flat(values: Values) -> tuple[Tensor, ...]:
    """The tensors one by one."""
    return values if isinstance(values, tuple) else (values,)


def _map(function: Callable[[Tensor], Tensor], values: Values) -> Values:
    return tuple(map(function, values)) if isinstance(values, tuple) else function(values)


def _place(x: Tensor) -> Tensor:
    return torch.zeros_like(x).requires_grad_(x.requires_grad)


def shapes(values: Values) -> tuple[Any, ...]:
    """What must be the same for recorded work to fit."""
    return tuple((x.shape, x.dtype) for x in flat(values))
