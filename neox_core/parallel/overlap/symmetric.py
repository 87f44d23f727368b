"""Exchanges between the GPUs of one host by their copy engines, which take no processors from the products.

Collectives do: NCCL's kernels wait until a product leaves room for them. Here a rank puts what others need into memory
that all can address (torch's symmetric memory), and each fetches it by plain copies on a stream alongside the products.

A rank's rows are multiplied by themselves where they are many, so that a product waits for few of them, and sends them
soon. Where they are few, since there are many ranks, several ranks' are multiplied together.

Memory is used again without asking everybody, since gathers and sums take turns, each with a place of its own: a rank
that has passed the barrier of one has seen that all were through with the one before. Two of a kind in a row, as when a
block is computed again, have a barrier between them. Barriers, a few microseconds each, stand between the products.
"""

from __future__ import annotations

import math
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from neox_core.model.elementwise import fused_on_cuda
from neox_core.parallel.overlap.exchange import Kind

ROWS = 4096
"""Of a product that fills a GPU: in tiles of 128 x 256, one with the 34B's w1 on eight ranks, of 2,752 columns, keeps
89% of an H100's processors busy, and 67% with half or a quarter of the rows."""


class SymmetricExchange:
    """The exchanges of one group of ranks, whose GPUs can read each other's memory.

    Args:
        group: the ranks.
        device: this rank's GPU.
        share: gives memory of so many bytes that all ranks can address, collectively; torch's, if it is None.
    """

    def __init__(
        self, group: dist.ProcessGroup, device: torch.device, share: Callable[[int], Any] | None = None
    ) -> None:
        self.device = device
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        """Of the copies alone: a barrier there would wait until a product leaves it a processor."""
        self._share = share or partial(shared_memory, group, device)
        self._memory: dict[Kind, Any] = {}
        self._outgrown: list[Any] = []
        """What recorded work may still use."""
        self.last: Kind | None = None
        """See Exchange: two of a kind in a row have a barrier between them, on all ranks or on none."""

    def begin_gather(self, rows_MD: Tensor) -> _Gathering:
        """See Exchange."""
        return _Gathering(self, self._begin("gather", rows_MD.nbytes), rows_MD)

    def begin_scatter(self, rows: int, width: int, dtype: torch.dtype) -> _Scattering:
        """See Exchange."""
        received = torch.empty(self.size - 1, rows, width, dtype=dtype, device=self.device)
        return _Scattering(self, self._begin("scatter", received.nbytes), received)

    def _begin(self, kind: Kind, size: int) -> Any:
        memory = self._memory.get(kind)
        if memory is None or memory.buffer_size < size:
            self._outgrown += [memory] if memory else []
            memory = self._memory[kind] = self._share(size)
        if kind == self.last:
            memory.barrier(channel=0)
        self.last = kind
        return memory

    def rejoin(self) -> None:
        """See Exchange."""
        with torch.cuda.stream(self.stream):
            recorded = torch.cuda.is_current_stream_capturing()
        if recorded:
            torch.cuda.current_stream().wait_stream(self.stream)


@fused_on_cuda
def copy_to_both(x: Tensor, first: Tensor, second: Tensor) -> None:
    """Copy a tensor to two places, read once."""
    first.copy_(x)
    second.copy_(x)


class _Gathering:
    def __init__(self, exchange: SymmetricExchange, memory: Any, rows_MD: Tensor) -> None:
        self._exchange, self._rows = exchange, rows_MD
        rank, ranks, stream = exchange.rank, exchange.size, exchange.stream
        self.whole_ND = rows_MD.new_empty(ranks * len(rows_MD), rows_MD.shape[1])
        copy_to_both(rows_MD, memory.get_buffer(rank, rows_MD.shape, rows_MD.dtype), self.whole_ND[self._of(rank)])
        memory.barrier(channel=0)
        stream.wait_stream(torch.cuda.current_stream())
        self._arrived: list[tuple[list[slice], torch.cuda.Event]] = []
        with torch.cuda.stream(stream):
            for peers in groups(others(rank, ranks), len(rows_MD)):
                for peer in peers:
                    self.whole_ND[self._of(peer)].copy_(memory.get_buffer(peer, rows_MD.shape, rows_MD.dtype))
                self._arrived.append((rows_of(peers, len(rows_MD)), stream.record_event()))

    def _of(self, rank: int) -> slice:
        return slice(rank * len(self._rows), (rank + 1) * len(self._rows))

    def arrivals(self) -> Iterator[tuple[slice, Tensor]]:
        """See Gathering."""
        yield self._of(self._exchange.rank), self._rows
        for pieces, event in self._arrived:
            torch.cuda.current_stream().wait_event(event)
            for rows in pieces:
                yield rows, self.whole_ND[rows]


class _Scattering:
    def __init__(self, exchange: SymmetricExchange, memory: Any, received: Tensor) -> None:
        self._exchange, self._memory, self._received = exchange, memory, received

    def sends(self) -> Iterator[tuple[slice, Tensor]]:
        """See Scattering. What is for the peer that is `step` + 1 ranks on lies at place `step` of a rank's memory."""
        rank, ranks, stream = self._exchange.rank, self._exchange.size, self._exchange.stream
        part, step = self._received.shape[1], 0
        for channel, peers in enumerate(groups(others(rank, ranks), part)):
            first = step
            for rows in rows_of(peers, part):
                count = (rows.stop - rows.start) // part
                yield rows, self._places(rank, step, count)
                step += count
            self._memory.barrier(channel=channel)
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for sent in range(first, step):
                    self._received[sent].copy_(self._places((rank - sent - 1) % ranks, sent, 1))

    def _places(self, rank: int, first: int, count: int) -> Tensor:
        _, rows, width = self._received.shape
        shape, start = (count * rows, width), first * rows * width
        places: Tensor = self._memory.get_buffer(rank, shape, self._received.dtype, start)
        return places

    def others(self) -> tuple[Tensor, ...]:
        """See Scattering."""
        torch.cuda.current_stream().wait_stream(self._exchange.stream)
        return self._received.unbind(0)


def others(rank: int, ranks: int) -> list[int]:
    """All but the rank, each rank's in another order, so that no two fetch from one at a time."""
    return [(rank + step) % ranks for step in range(1, ranks)]


def groups(peers: Sequence[int], rows: int) -> list[Sequence[int]]:
    """The peers in their order, as many together as have ROWS, of so many each."""
    size = math.ceil(ROWS / rows)
    return [peers[start : start + size] for start in range(0, len(peers), size)]


def rows_of(peers: Sequence[int], rows: int) -> list[slice]:
    """Where peers that follow each other have theirs, of so many each: two places where the last rank is followed by
    the first."""
    wraps = next((i for i in range(1, len(peers)) if peers[i] < peers[i - 1]), len(peers))
    runs = [run for run in (peers[:wraps], peers[wraps:]) if run]
    return [slice(run[0] * rows, (run[-1] + 1) * rows) for run in runs]


def shared_memory(group: dist.ProcessGroup, device: torch.device, size: int) -> Any:
    """Memory of so many bytes that all ranks of the group can address. Collective.

    torch 2.11 clears the memory's signals and writes lists of everybody's addresses on the default stream, for which
    ours does not wait, nor it for ours: the lists into free blocks, which work under way may still use.
    """
    import torch.distributed._symmetric_memory as symmetric_memory  # where torch keeps it, public name or not

    own = symmetric_memory.empty(size, dtype=torch.uint8, device=device)
    torch.cuda.synchronize(device)  # before others see the signals, and before free blocks are written to
    memory = symmetric_memory.rendezvous(own, group)
    torch.cuda.synchronize(device)  # the lists are there
    return memory


def why_not(group: dist.ProcessGroup, device: torch.device) -> str | None:
    """What keeps the group's ranks from such exchanges; None: nothing. Collective."""
    if device.type != "cuda":
        return "there is no GPU"
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, (socket.gethostname(), torch.cuda.current_device(), _reads_all_peers()), group=group)
    hosts, numbers, reads = zip(*found, strict=True)
    if len(set(hosts)) > 1:
        return f"the ranks are on {len(set(hosts))} hosts"
    if len(set(numbers)) < len(numbers) and os.environ.get("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES") != "1":
        return "ranks do not see each other's GPUs: let each see all of its node's"  # torch takes them for one
    return None if all(reads) else "the host's GPUs cannot read each other's memory"


def _reads_all_peers() -> bool:
    own, count = torch.cuda.current_device(), torch.cuda.device_count()
    return all(torch.cuda.can_device_access_peer(own, peer) for peer in range(count) if peer != own)
