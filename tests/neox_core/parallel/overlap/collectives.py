"""An exchange by gloo's collectives, which are done when it says that rows have arrived: the Protocol on CPUs."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from neox_core.parallel.overlap.exchange import Kind


class CollectiveExchange:
    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)
        self.begun: list[str] = []
        self.last: Kind | None = None

    def slices(self, rows: int) -> list[slice]:
        """Each rank's, this one's first."""
        order = [(self.rank + step) % self.size for step in range(self.size)]
        return [slice(rank * rows, (rank + 1) * rows) for rank in order]

    def begin_gather(self, rows_MD: Tensor) -> CollectiveGathering:
        self.begun.append("gather")
        return CollectiveGathering(self, rows_MD)

    def begin_scatter(self, rows: int, width: int, dtype: torch.dtype) -> CollectiveScattering:
        self.begun.append("scatter")
        return CollectiveScattering(self, torch.full((self.size * rows, width), torch.nan, dtype=dtype))

    def rejoin(self) -> None: ...


class CollectiveGathering:
    def __init__(self, exchange: CollectiveExchange, rows_MD: Tensor) -> None:
        self._exchange, self._rows = exchange, rows_MD.clone()
        self.whole_ND = rows_MD.new_full((exchange.size * len(rows_MD), rows_MD.shape[1]), torch.nan)

    def arrivals(self) -> Iterator[tuple[slice, Tensor]]:
        own, *others = self._exchange.slices(len(self._rows))
        arriving = self.whole_ND.data  # autograd has saved it, and would take what arrives for a change
        arriving[own] = self._rows
        yield own, self._rows
        dist.all_gather_into_tensor(arriving, self._rows, group=self._exchange.group)
        for rows in others:
            yield rows, arriving[rows]


class CollectiveScattering:
    def __init__(self, exchange: CollectiveExchange, partial_ND: Tensor) -> None:
        self._exchange, self._partial = exchange, partial_ND

    def sends(self) -> Iterator[tuple[slice, Tensor]]:
        _, *others = self._exchange.slices(len(self._partial) // self._exchange.size)
        for rows in others:
            yield rows, self._partial[rows]

    def others(self) -> tuple[Tensor, ...]:
        received = torch.empty_like(self._partial)
        dist.all_to_all_single(received, self._partial, group=self._exchange.group)
        parts = received.chunk(self._exchange.size)
        return tuple(part for rank, part in enumerate(parts) if rank != self._exchange.rank)
