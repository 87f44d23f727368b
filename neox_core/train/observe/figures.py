"""A step's figures on their way to the log: from all ranks to rank 0's device, and from there to its host."""

from __future__ import annotations

import itertools
import resource
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from neox_core.train.observe.phases import Event, Phases, new_event

_GIB = 2**30


@dataclass
class Figures:
    """What is known of the steps since the last ones that were logged."""

    step: int
    """The last of them."""
    steps: int
    """Their number."""
    tokens: int
    """Of all of them, over all ranks."""
    known: Mapping[str, float]
    """What the host knew at once."""
    scalars: Mapping[str, Tensor]
    """What the device knew."""
    sums: int
    """How many of a rank's figures are to be summed up; of the others the largest counts."""
    gathered: Tensor
    """Figures of all ranks, one after the other."""
    work: Any
    """The exchange that brings them together, for which nobody waits before the next step's end."""
    phases: Phases | None = None
    logging_seconds: float = 0.0
    """Spent by the host outside of the phases."""
    _on_host: Tensor | None = None
    _copied: Event | None = None

    def send(self, rank: int, world_size: int) -> None:
        """Start the way of the sums and largest figures, and the scalars, to rank 0's host."""
        self.work.wait()  # on a GPU, its stream waits, not the host
        if rank != 0:
            return
        everywhere = self.gathered.view(world_size, -1)
        sums, largest = everywhere[:, : self.sums].sum(0), everywhere[:, self.sums :].amax(0)
        figures = torch.cat((sums, largest, *self.scalars.values()))
        self._on_host = torch.empty(figures.shape, pin_memory=figures.is_cuda)
        self._on_host.copy_(figures, non_blocking=True)
        self._copied = new_event(figures.device)
        self._copied.record()

    def arrived(self, wait: bool = False) -> bool:
        """Whether everything can be read without waiting; with `wait`, after it."""
        assert self._copied is not None, "not sent"
        assert self.phases is not None, "the phases were not taken"
        if wait:
            self._copied.synchronize()
            self.phases.wait()
        return self._copied.query() and self.phases.passed()

    def read(self, *sizes: int) -> list[list[float]]:
        """Sums, largest figures and scalars, in parts of these sizes."""
        assert self._on_host is not None, "not sent"
        values = iter(self._on_host.tolist())
        return [list(itertools.islice(values, size)) for size in sizes]

    def seconds(self) -> dict[str, float]:
        """Mean time of each phase over the steps."""
        assert self.phases is not None, "the phases were not taken"
        return {phase: total / self.steps for phase, total in self.phases.seconds().items()}


def peak_memory(device: torch.device) -> dict[str, float]:
    """Peaks so far, in GiB, by name."""
    if device.type == "cuda":
        allocated, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
        return {"memory/allocated_gib": allocated / _GIB, "memory/reserved_gib": reserved / _GIB}
    return {"memory/resident_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / _GIB}
