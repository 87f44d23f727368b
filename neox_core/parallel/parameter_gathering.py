"""A flat parameter's parts from the data-parallel ranks that own them, while the layers that are through compute.

Each rank updates its own contiguous part (ZeRO stage 1, arXiv 1910.02054), in the order of the layers, in which the
next forward pass needs them. A bucket is a run of one owner's part, who sends it to the others: over a ring, each link
then carries each parameter once, as in a gathering of everything.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from neox_core.parallel.gradient_reduction import BUCKET_BYTES, layer_ends


class OverlappedGathering:
    """Gives each rank the others' parts of a flat parameter.

    Args:
        flat: as many elements per rank of the group; parameters one after the other.
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
        self._owned = flat.numel() // dist.get_world_size(group)
        largest = max(1, bucket_bytes // flat.element_size())
        self._starts = [
            start
            for first in range(0, flat.numel(), self._owned)
            for start in range(first, first + self._owned, largest)
        ]
        ends = layer_ends(sizes, layers)
        self._needed = {layer: sum(start < end for start in self._starts) for layer, end in ends.items()}
        """Buckets that a layer waits for: the first ones, up to its end."""
        self._needed[max(ends)] = len(self._starts)  # and what fills up the last owner's part
        self._under_way = deque[dist.Work]()
        self._arrivals = _events(len(self._starts)) if flat.is_cuda else []
        """On GPUs, of each bucket and all before it."""
        self._stream = torch.cuda.Stream(flat.device) if flat.is_cuda else None  # type: ignore[no-untyped-call]
        """Of these events alone."""

    @property
    def buckets_under_way(self) -> int:
        """Number of buckets that nobody has waited for yet; on GPUs, where streams wait, none."""
        return len(self._under_way)

    def begin(self) -> None:
        """The own part is updated, and nothing else of the flat parameter is in use."""
        for start, end in zip(self._starts, [*self._starts[1:], self._flat.numel()], strict=True):
            owner = dist.get_global_rank(self._group, start // self._owned)
            work = dist.broadcast(self._flat[start:end], owner, self._group, async_op=True)
            assert work is not None
            self._under_way.append(work)
        with torch.cuda.stream(self._stream):
            for arrival in self._arrivals:
                self._under_way.popleft().wait()
                arrival.record()

    def wait_for(self, layer: int) -> None:
        """What the current stream does from now on finds the layer's parameters, and those of all before it."""
        self._wait(self._needed.get(layer, 0))

    def finish(self) -> None:
        """What the current stream does from now on finds all parameters."""
        self._wait(len(self._starts))

    def _wait(self, buckets: int) -> None:
        if self._arrivals and buckets:
            self._arrivals[buckets - 1].wait()
        while len(self._under_way) > len(self._starts) - buckets:
            self._under_way.popleft().wait()


def _events(count: int) -> list[torch.cuda.Event]:
    """Events whose waits can be recorded in a CUDA graph: a replay waits for the newest record before it.

    Torch leaves out a wait for an event that has none yet, from the graph too, so that each gets one at once.
    """
    events = [torch.cuda.Event(external=True) for _ in range(count)]  # type: ignore[no-untyped-call]
    for event in events:
        event.record()
    return events
