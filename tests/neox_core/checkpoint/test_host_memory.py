"""Host memory of checkpoints, by a driver that only takes notes; what GPUs add is in tests/gpu/test_host_memory.py."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from neox_core.checkpoint.host_memory import HostBuffers, _allocate


@pytest.fixture
def pinned(monkeypatch: pytest.MonkeyPatch) -> dict[int, int]:
    """Addresses and sizes of what is pinned now."""
    now: dict[int, int] = {}

    def pin(address: int, size: int, _: int) -> int:
        assert address not in now
        now[address] = size
        return 0

    def unpin(address: int) -> None:
        assert ctypes.string_at(address, 1) == b"\x07", "it is there still"
        del now[address]

    monkeypatch.setattr(torch.cuda, "cudart", lambda: SimpleNamespace(cudaHostRegister=pin, cudaHostUnregister=unpin))
    return now


def test_memory_is_pinned_as_long_as_a_tensor_uses_it(pinned: dict[int, int]) -> None:
    buffer: Tensor = _allocate(4096, pinned=True).fill_(7)
    assert pinned == {buffer.data_ptr(): 4096}
    view = buffer.view(torch.float32).view(2, 512)[1]
    del buffer
    assert len(pinned) == 1
    del view
    assert not pinned


def test_a_buffer_of_another_size_is_unpinned(pinned: dict[int, int]) -> None:
    buffers = HostBuffers()
    for size in (4096, 8192, 8192):
        buffers.begin()
        buffers._buffer(size, pinned=True).fill_(7)
        assert list(pinned.values()) == [size]
    del buffers
    assert not pinned


def test_of_cpus_nothing_is_pinned(pinned: dict[int, int]) -> None:
    value = {"a": torch.arange(5), "empty": torch.empty(0)}
    copied = HostBuffers().copy(value)
    assert copied["a"].tolist() == value["a"].tolist()
    assert copied["a"].data_ptr() != value["a"].data_ptr()
    assert _allocate(0, pinned=True).numel() == 0
    assert not pinned
