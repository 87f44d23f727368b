"""Host memory that takes a copy of a rank's state at each save, always the same."""

from __future__ import annotations

import weakref
from contextlib import suppress
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor


@runtime_checkable
class Fp32Numbers(Protocol):
    """Numbers that are computed as they are copied, such as packed master weights."""

    def numel(self) -> int:
        """How many."""
        ...

    def copy_to(self, host: Tensor) -> None:
        """Fill a flat fp32 tensor in host memory, or have the current stream do so."""
        ...


class HostBuffers:
    """Buffers for the tensors of one save, which the next one uses again; pinned where GPUs copy to them.

    A state has the same tensors in the same order each time, so that the buffers fit and memory does not grow.
    """

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []
        self._used = 0

    def begin(self) -> None:
        """A save begins; nobody needs the last one's copies any more."""
        self._used = 0

    @property
    def nbytes(self) -> int:
        """Bytes of this save's copies so far."""
        return sum(buffer.numel() for buffer in self._buffers[: self._used])

    def copy(self, value: Any) -> Any:
        """All tensors in nested containers, copied; from a GPU by the current stream, which may not be done yet."""
        if isinstance(value, Tensor):
            host = self._buffer(value.nbytes, value.is_cuda).view(value.dtype).view(value.shape)
            return host.copy_(value.detach(), non_blocking=True)
        if isinstance(value, Fp32Numbers):
            host = self._buffer(4 * value.numel(), torch.cuda.is_initialized()).view(torch.float32)  # type: ignore[no-untyped-call]
            value.copy_to(host)
            return host
        if isinstance(value, dict):
            return type(value)((key, self.copy(item)) for key, item in value.items())
        if type(value) in (list, tuple):
            return type(value)(self.copy(item) for item in value)
        return value

    def _buffer(self, size: int, pinned: bool) -> Tensor:
        """The next buffer, of so many bytes."""
        if self._used == len(self._buffers):
            self._buffers.append(torch.empty(0, dtype=torch.uint8))
        if self._buffers[self._used].numel() != size:
            self._buffers[self._used] = torch.empty(0, dtype=torch.uint8)  # given back first
            self._buffers[self._used] = _allocate(size, pinned)
        self._used += 1
        return self._buffers[self._used - 1]


def _allocate(size: int, pinned: bool) -> Tensor:
    memory = np.empty(size, np.uint8)
    # torch's own pinned memory has powers of two as sizes: a third more on average, and up to twice as much.
    if pinned and size and not _pin(memory):
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)
    return torch.from_numpy(memory)


def _pin(memory: np.ndarray) -> bool:
    """Let GPUs copy to memory directly until its last tensor is gone; False if the driver refuses.

    Were it not unpinned before it is given back, what is later put at its address would be copied from and to the pages
    of old, unnoticed.
    """
    runtime, address = torch.cuda.cudart(), memory.ctypes.data  # type: ignore[no-untyped-call]
    if int(runtime.cudaHostRegister(address, memory.nbytes, 0)):
        with suppress(RuntimeError):  # the next kernel reports what CUDA last refused: let it be this one
            torch.zeros(1, device="cuda")
        return False
    weakref.finalize(memory, runtime.cudaHostUnregister, address).atexit = False
    return True
