"""Weights that several tensor-parallel ranks hold: where they lie, and their gradients' sum."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from neox_core.parallel.sharding import Sharding, sharding_of


def replicated_elements(parameters: Sequence[Tensor]) -> list[range]:
    """Where parameters that each rank has lie when all are flattened one after the other; neighbours as one range."""
    return _elements(parameters, lambda sharding: sharding.replicated)


def partial_elements(parameters: Sequence[Tensor]) -> list[range]:
    """Where those of them lie whose gradient is the sum over the ranks."""
    return _elements(parameters, lambda sharding: sharding.replicated and sharding.partial_gradient)


def _elements(parameters: Sequence[Tensor], wanted: Callable[[Sharding], bool]) -> list[range]:
    ranges: list[range] = []
    offset = 0
    for parameter in parameters:
        end = offset + parameter.numel()
        if wanted(sharding_of(parameter)):
            start = ranges.pop().start if ranges and ranges[-1].stop == offset else offset
            ranges.append(range(start, end))
        offset = end
    return ranges


def shared_elements(parameters: Sequence[Tensor]) -> list[range]:
    """Where the rows lie that some of the ranks have in common."""
    ranges, offset = [], 0
    for parameter in parameters:
        for rows in sharding_of(parameter).shared_rows:
            width = parameter[0].numel()  # 1 of a bias or a scale
            ranges.append(range(offset + rows.start * width, offset + rows.stop * width))
        offset += parameter.numel()
    return ranges


class ReplicatedGradients:
    """Pieces of a flat gradient that the ranks of a group share.

    Args:
        gradient: this rank's partition of the flat gradient.
        first: where the partition begins in it.
        elements: the shared ones, counted from the flat gradient's begin.
        group: the ranks that share them, in the same order.
    """

    def __init__(self, gradient: Tensor, first: int, elements: Sequence[range], group: dist.ProcessGroup) -> None:
        size = gradient.numel()
        clipped = [(max(r.start - first, 0), min(r.stop - first, size)) for r in elements]
        self._pieces = [gradient[start:stop] for start, stop in clipped if start < stop]
        self._group = group

    def sum(self) -> None:
        """Give every rank the sum of the ranks' parts, the same bits on each."""
        if not self._pieces:
            return  # the ranks of the group have the same partition, so none has any
        total = torch.cat(self._pieces)
        dist.all_reduce(total, group=self._group)
        torch._foreach_copy_(self._pieces, torch.split(total, [piece.numel() for piece in self._pieces]))
