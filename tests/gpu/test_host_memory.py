"""Host memory of checkpoints that GPUs copy to directly: what CUDA says of it, and what is left of it afterwards.

pytest -m gpu tests/gpu/test_host_memory.py
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from neox_core.checkpoint.host_memory import HostBuffers, _allocate, _pin

SIZE = 1 << 26
"""Of so many bytes, memory is asked of the system and given back to it each time, mostly at the same address."""

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="pinned memory is that of GPUs"),
]


def test_a_gpu_copies_to_it_directly() -> None:
    values = torch.arange(SIZE // 8, device="cuda")
    copied = HostBuffers().copy({"values": values})["values"]
    torch.cuda.synchronize()
    assert copied.is_pinned()
    assert torch.equal(copied, torch.arange(SIZE // 8))


def test_what_is_put_at_its_address_afterwards_is_ordinary_memory() -> None:
    torch.cuda.init()  # type: ignore[no-untyped-call]
    addresses = set()
    for turn in range(8):
        copied = HostBuffers().copy(torch.full((SIZE,), turn, dtype=torch.uint8, device="cuda"))
        torch.cuda.synchronize()
        assert bool((copied == turn).all())
        addresses.add(copied.data_ptr())
        del copied
        ordinary = torch.empty(SIZE, dtype=torch.uint8)
        addresses.add(ordinary.data_ptr())
        ordinary.copy_(torch.full((SIZE,), turn + 100, dtype=torch.uint8, device="cuda"))
        assert bool((ordinary == turn + 100).all())
        assert not ordinary.is_pinned()
        del ordinary
    assert len(addresses) < 16, "no address was used again: the test tests nothing"


def test_memory_that_the_driver_refuses_to_pin() -> None:
    torch.cuda.init()  # type: ignore[no-untyped-call]
    memory = np.empty(SIZE, np.uint8)
    assert _pin(memory)
    assert not _pin(memory), "it is pinned already"
    assert torch.ones(8, device="cuda").cumsum(0).tolist() == list(range(1, 9)), "of that, later work hears nothing"


def test_pinned_by_torch_where_the_driver_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.cuda.init()  # type: ignore[no-untyped-call]
    taken = np.empty(SIZE, np.uint8)
    assert _pin(taken)
    monkeypatch.setattr(np, "empty", lambda *_: taken)
    memory = _allocate(SIZE, pinned=True)
    assert memory.data_ptr() != taken.ctypes.data
    assert memory.is_pinned()
