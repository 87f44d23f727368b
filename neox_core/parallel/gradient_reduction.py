"""Sum of a flat gradient over data-parallel ranks, bucket by bucket while the backward pass goes on.

Each rank owns a contiguous part of the flat gradient (ZeRO stage 1, arXiv 1910.02054), in the order of the layers, and
the backward pass comes from the last layer. A bucket is a run of one owner's part and is reduced to that owner alone:
over a ring, each link then carries each gradient once, as in a reduce-scatter.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch.distributed as dist
from torch import Tensor

BUCKET_BYTES = 128 * 2**20
"""Large enough for the bandwidth of 32 ranks, small enough for dozens of buckets in a stage."""


class OverlappedReduction:
    """Averages a flat gradient; each rank gets its own part's. Other parts hold nothing of use afterwards.

    Args:
        flat: fp32, as many elements per rank of the group; parameters one after the other.
        group: the data-parallel ranks.
        sizes: elements of each parameter.
        layers: the layer of each parameter, in ascending order.
        bucket_bytes: size of a bucket.
    """

    def __init__(
        self,
        flat: Tensor,
        group: dist.ProcessGroup,
        sizes: Sequence[int],
        layers: Sequence[int],
        bucket_bytes: int = BUCKET_BYTES,
    ) -> None:
        self._flat, self._group = flat, group
        ends = layer_ends(sizes, layers)
        self._ends, self._layer_ends = list(accumulate(sizes)), [ends[layer] for layer in layers]
        self._owned = flat.numel() // dist.get_world_size(group)
        self.bucket_elements = max(1, bucket_bytes // flat.element_size())
        self._under_way: list[dist.Work] = []
        self._begun = False
        self._reduced_from = flat.numel()
        """All from here on is on its way to its owner."""

    @property
    def buckets_under_way(self) -> int:
        """Number of buckets whose reduction has begun."""
        return len(self._under_way)

    def begin(self) -> None:
        """The backward pass that comes is the last one before the sum is needed."""
        self._begun = True

    def on_gradient(self, parameter: int) -> None:
        """A parameter's gradient was added: the layers after its own are through."""
        if not self._begun:
            return
        if self._ends[parameter] > self._reduced_from:
            raise RuntimeError(f"the gradient of parameter {parameter} came after its reduction began")
        self._reduce_down_to(self._layer_ends[parameter])

    def finish(self) -> None:
        """Reduce what is left, and wait for all of it."""
        self._reduce_down_to(0, partial_buckets=True)
        self.rejoin()
        self.forget()

    def rejoin(self) -> None:
        """Have the current stream wait for what is under way."""
        for work in self._under_way:
            work.wait()

    def forget(self) -> None:
        """Nothing is under way."""
        self._under_way, self._begun, self._reduced_from = [], False, self._flat.numel()

    def _reduce_down_to(self, element: int, partial_buckets: bool = False) -> None:
        while self._reduced_from > element:
            owner = (self._reduced_from - 1) // self._owned
            start = max(owner * self._owned, self._reduced_from - self.bucket_elements)
            if start < element and not partial_buckets:
                return
            self._under_way.append(self._reduce(self._flat[start : self._reduced_from], owner))
            self._reduced_from = start

    def _reduce(self, bucket: Tensor, owner: int) -> dist.Work:
        operation = average(bucket, self._group)
        destination = dist.get_global_rank(self._group, owner)
        return dist.reduce(bucket, destination, operation, self._group, async_op=True)


def average(gradient: Tensor, group: dist.ProcessGroup) -> dist.ReduceOp.RedOpType:
    """The operation that averages over the group; divides first where the library can only sum."""
    if gradient.is_cuda:
        return dist.ReduceOp.AVG
    gradient.div_(dist.get_world_size(group))
    return dist.ReduceOp.SUM


def layer_ends(sizes: Sequence[int], layers: Sequence[int]) -> dict[int, int]:
    """Where each layer's parameters end, when all are one after the other in the order of the layers."""
    return dict(zip(layers, accumulate(sizes), strict=True))  # of a layer's parameters, the last one stays
