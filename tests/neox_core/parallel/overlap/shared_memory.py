"""What stands in for symmetric memory, and for an exchange's group and GPU, on CPUs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from neox_core.parallel.overlap.symmetric import SymmetricExchange


class SharedMemory:
    """All ranks' memory, as one of them has it; what a barrier is, the test says."""

    def __init__(self, parts: list[Tensor]) -> None:
        self._parts, self.buffer_size = parts, parts[0].nbytes

    def get_buffer(self, rank: int, shape: tuple[int, ...], dtype: torch.dtype, offset: int = 0) -> Tensor:
        whole = self._parts[rank].view(dtype)
        return whole[offset : offset + torch.Size(shape).numel()].view(shape)


def exchange_of(rank: int, ranks: int, stream: Any, share: Callable[[int], Any]) -> SymmetricExchange:
    """A rank's, without a process group."""
    exchange = cast(Any, SymmetricExchange.__new__(SymmetricExchange))
    exchange._share, exchange.device, exchange.rank, exchange.size = share, torch.device("cpu"), rank, ranks
    exchange.stream, exchange._memory, exchange._outgrown, exchange.last = stream, {}, [], None
    return cast(SymmetricExchange, exchange)
