"""Which of a stage's passes are replayed from CUDA graphs, and what they are for DeepSpeed's pipeline."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from operator import call
from typing import Any

import torch
from torch import Tensor

from neox_core.train.engine.graphs.capture import CudaRecorder, Passed, StageGraphs, Values, Work, flat, shapes

logger = logging.getLogger(__name__)


class GraphedStage:
    """Replays micro batches in the place of an engine's forward and backward passes.

    The first step of a kind runs without graphs, which compiles and chooses all kernels; the second begins by recording
    them. Another shape or number of micro batches is another kind, also where that number is the other ranks', by which
    all divide their gradients. Validation is not recorded.

    Args:
        engine: DeepSpeed's pipeline engine with our optimizer.
        reduces: there are several data-parallel ranks, which sum up gradients during a step's last backward pass.
        new_recorder: makes what records a slot; None: CUDA does.
    """

    def __init__(self, engine: Any, reduces: bool, new_recorder: Any = None) -> None:
        self._engine, self._reduces = engine, reduces
        self._new_recorder = new_recorder or partial(CudaRecorder, self._rejoin)
        self._kind: tuple[Any, ...] = ()
        self._graphs: StageGraphs | None = None
        self._failed = False
        self._forwards = self._backwards = self._weights = 0
        self.replaying = False
        """The step under way."""

    def close(self) -> None:
        """Let go of what was recorded."""
        torch.cuda.synchronize()
        self._graphs, self._kind = None, ()
        gc.collect()

    def end_step(self) -> None:
        """All micro batches are through."""
        self._forwards = self._backwards = self._weights = 0
        self.replaying = False

    def forward(self, buffer: int) -> bool:
        """Do a forward pass, if it can be replayed; False: the engine has to do it."""
        engine = self._engine
        inputs = engine.pipe_buffers["inputs"][buffer]
        targets = engine.pipe_buffers["labels"][buffer] if engine.is_last_stage() else None
        if self._forwards == 0:
            self.replaying = self._ready(inputs, targets)
        if not self.replaying:
            self._forwards += 1
            return False
        assert self._graphs is not None
        slot = self._graphs.slot(self._forwards)
        self._forwards += 1
        passed = slot.forward(inputs, targets)
        engine.pipe_buffers["inputs"][buffer] = slot.inputs
        if targets is None:
            engine.pipe_buffers["outputs"][buffer] = passed.results
        else:
            self._take_loss(flat(passed.results)[0], targets, passed.report)
        return True

    def _take_loss(self, loss: Tensor, targets: Tensor, report: tuple[Tensor, ...]) -> None:
        engine, loss_fn = self._engine, self._engine.module.loss_fn
        loss_fn.count(targets)
        if loss_fn.on_token_losses is not None:
            loss_fn.on_token_losses(*report)
        engine.fwd_outputs.append(loss)
        engine.total_loss = loss.clone() if engine.total_loss is None else engine.total_loss + loss

    def backward(self) -> bool:
        """Do a backward pass, if its forward pass was replayed."""
        if not self.replaying:
            return False
        assert self._graphs is not None
        slot = self._graphs.slot(self._backwards)
        self._backwards += 1
        received = None if self._engine.is_last_stage() else self._engine.grad_layer
        slot.backward(received if received is None or isinstance(received, Tensor) else received[0])
        return True

    def add_weight_gradients(self) -> bool:
        """Add those that a backward pass has deferred, if it was replayed."""
        if not self.replaying:
            return False
        assert self._graphs is not None
        self._graphs.slot(self._weights).add_weight_gradients()
        self._weights += 1
        return True

    def _ready(self, inputs: Values, targets: Tensor | None) -> bool:
        engine = self._engine
        kind = (shapes(inputs), engine.micro_batches, engine.gradient_accumulation_steps())
        if self._failed or kind != self._kind:
            self._kind, self._graphs = kind, None
            return False
        if self._graphs is None:
            self._record(inputs, targets)
        return self._graphs is not None

    def _record(self, inputs: Values, targets: Tensor | None) -> None:
        engine, count = self._engine, self._engine.micro_batches
        self._forget_passes()
        # A stage that defers weights' gradients keeps a micro batch until these are added.
        in_flight = engine.num_stages - (engine.stage_id if engine.deferred is None else 0)
        exchange = engine._mesh.exchange
        exchanged = exchange.last if exchange else None
        try:
            self._graphs = StageGraphs(
                self._work(last=False),
                self._work(last=True) if self._reduces else None,
                inputs,
                targets,
                count,
                in_flight,
                self._new_recorder,
            )
            logger.info("CUDA graphs: recorded for steps of %d micro batches", count)
        except RuntimeError as error:
            self._failed = True
            if exchange:
                exchange.last = exchanged  # as for other ranks, which may have recorded all
            engine.optimizer.reduction.forget()
            if engine.deferred is not None:
                engine.deferred.forget()
            reason = str(error).splitlines()[0]
            logger.warning("CUDA graphs: off, since recording a micro batch failed: %s", reason, exc_info=True)
        if self._failed:
            gc.collect()  # the error refers to the functions that failed, and these to activations

    def _rejoin(self) -> None:
        """Reductions and copies that were to run alongside what is recorded, which fails."""
        with suppress(RuntimeError):  # as it may have failed, all that follows it fails
            self._engine.optimizer.reduction.rejoin()
            if exchange := self._engine._mesh.exchange:
                exchange.rejoin()

    def _forget_passes(self) -> None:
        """DeepSpeed keeps the last micro batches' graphs of autograd, with nodes and memory of theirs."""
        engine = self._engine
        engine.loss = None
        for name in ("outputs", "output_tensors"):
            engine.pipe_buffers[name] = [None] * len(engine.pipe_buffers[name])
        gc.collect()

    def _work(self, last: bool) -> Work:
        """Of a micro batch; `last`: of a step's last one, with the reduction."""
        deferred, completed = self._engine.deferred, self._reduced if last else call
        if deferred is None:
            return Work(self._forward_once, lambda *passed: completed(partial(self._backward_once, *passed)))

        def backward(results: Values, gradient: Tensor | None) -> None:
            with deferred.defer():
                self._backward_once(results, gradient)

        return Work(self._forward_once, backward, lambda: completed(deferred.add_next))

    def _forward_once(self, inputs: Values, targets: Tensor | None) -> Passed:
        module = self._engine.module
        results = module(inputs)
        if targets is None:
            return Passed(results)
        observer, report = module.loss_fn.on_token_losses, list[tuple[Tensor, ...]]()
        module.loss_fn.on_token_losses = lambda *found: report.append(found)
        try:
            loss = module.loss_fn.mean(results, targets)
        finally:
            module.loss_fn.on_token_losses = observer
        return Passed(loss, *report)

    def _backward_once(self, results: Values, gradient: Tensor | None) -> None:
        first = flat(results)[0]
        if gradient is None:
            first = self._engine._scale_loss_by_gas(first)
        first.backward(gradient)  # type: ignore[no-untyped-call]

    def _reduced(self, work: Callable[[], None]) -> None:
        """Work that completes the gradients, which are averaged alongside it."""
        self._engine.optimizer.begin_reduction()
        work()
        with torch.no_grad():
            self._engine.optimizer.reduction.finish()


def why_not(engine: Any, device: torch.device) -> str | None:
    """What keeps an engine's passes from being recorded; None: nothing."""
    if device.type != "cuda":
        return "there is no GPU"
    if engine.is_pipe_partitioned and engine.num_stages > 1:
        return "stages put their hidden states together from parts: set parallel.sequence to true"
    return None
