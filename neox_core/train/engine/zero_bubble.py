"""The order of a pipeline stage's work in which weights' gradients fill the time that it would wait (ZB-H1).

Source: arXiv 2401.10241. Of three equal parts of a micro batch (forward, gradients of inputs, gradients of weights),
a step waits three for each stage but one in 1F1B, and one here; more where micro batches are fewer than stages.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from deepspeed.runtime.pipe.schedule import (
    BackwardPass,
    ForwardPass,
    PipeInstruction,
    ReduceTiedGrads,
    SendGrad,
    TrainSchedule,
)


class WeightGradients(PipeInstruction):  # type: ignore[misc]
    """Add the weights' gradients of the micro batch that has waited longest for it."""


class ZeroBubbleSchedule(TrainSchedule):  # type: ignore[misc]
    """DeepSpeed's 1F1B, with backward passes that only make the gradients of inputs.

    A stage has up to as many micro batches wait for their weights' gradients as stages come before it; so each adds
    none while the next stages are waiting for their first gradients. As all are through forward, it first sends the
    gradient that the stage before waits for, then adds what waits. No stage sends or receives anything in another order
    than in 1F1B.
    """

    def steps(self) -> Iterator[list[Any]]:
        """As TrainSchedule's."""
        to_come, waiting = self.micro_batches, 0
        for commands in super().steps():
            done: list[Any] = []
            for command in commands:
                if isinstance(command, ReduceTiedGrads):  # the step's work is done
                    done += [WeightGradients()] * waiting
                done.append(command)
                to_come -= isinstance(command, ForwardPass)
                waiting += isinstance(command, BackwardPass)
                full = isinstance(command, BackwardPass) and to_come > 0 and waiting > self.stage_id
                if full or (isinstance(command, SendGrad) and to_come == 0 and waiting > 0):
                    done.append(WeightGradients())
                    waiting -= 1
            yield done
