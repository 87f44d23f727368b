"""A flat parameter's parts from the data-parallel ranks that own them, while the layers that are through compute.

Each rank updates its own contiguous part (ZeRO stage 1, arXiv 1910.02054), in the order of the layers, in which the
next forward pass needs them. A bucket is a run of one owner's part, who sends it to the others: over a ring, each link
then carries each parameter once, as in a gathering of everything.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

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
        self._under_way: deque[dist.Work] = deque()

    @property
    def buckets_under_way(self) -> int:
        """Number of buckets that nobody has waited for yet."""
        return len(self._under_way)

    def begin(self) -> None:
        """The own part is updated, and nothing else of the flat parameter is in use."""
        for start, end in zip(self._starts, [*self._starts[1:], self._flat.numel()], strict=True):
            owner = dist.get_global_rank(self._group, start // self._owned)
            work = dist.broadcast(self._flat[start:end], owner, self._group, async_op=True)
            assert work is not None
            self._under_way.append(work)

    def wait_for(self, layer: int) -> None:
        """What the current stream does from now on finds the layer's parameters, and those of all before it."""
        self._wait(len(self._starts) - self._needed.get(layer, 0))

    def finish(self) -> None:
        """What the current stream does from now on finds all parameters."""
        self._wait(0)

    def _wait(self, left: int) -> None:
        while len(self._under_way) > left:
            self._under_way.popleft().wait()
