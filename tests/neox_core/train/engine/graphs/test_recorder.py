"""How a recording that fails is ended, with CUDA's capture played; tests/gpu/test_graphs.py does it for real."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from neox_core.train.engine.graphs.capture import CudaRecorder


class Cuda:
    """Ends no recording that another stream has left, and does not close its memory pool then, as torch 2.11."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.apart = False
        self.open: list[Any] = []
        self.used: list[Any] = []
        for name, value in {
            "graph_pool_handle": lambda: "pool",
            "CUDAGraph": lambda: "graph",
            "current_stream": lambda: "stream",
            "current_device": lambda: 3,
            "graph": self._graph,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", self._close, raising=False)
        monkeypatch.setattr(torch._C, "_cuda_releasePool", self._release, raising=False)

    @contextmanager
    def _graph(self, graph: Any, pool: Any, stream: Any, capture_error_mode: str) -> Iterator[None]:
        self.open.append((3, pool))
        self.used.append((3, pool))
        try:
            yield
        finally:
            if self.apart:
                raise RuntimeError("capturing stream has unjoined work")
            self._close(3, pool)

    def _close(self, device: int, pool: Any) -> None:
        if (device, pool) not in self.open:
            raise RuntimeError("not currently recording to the pool")
        self.open.remove((device, pool))

    def _release(self, device: int, pool: Any) -> None:
        self.used.remove((device, pool))

    def rejoin(self) -> None:
        self.apart = False


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    return Cuda(monkeypatch)


def test_what_is_recorded_keeps_its_pool(cuda: Cuda) -> None:
    assert CudaRecorder(cuda.rejoin).record(lambda: None) == "graph"  # type: ignore[comparison-overlap]
    assert not cuda.open
    assert len(cuda.used) == 1


def fail(cuda: Cuda) -> None:
    cuda.apart = True
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB")


def test_streams_come_together_where_work_fails(cuda: Cuda) -> None:
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
        CudaRecorder(cuda.rejoin).record(lambda: fail(cuda))
    assert not cuda.open
    assert len(cuda.used) == 1, "the graph's to release, as it was ended"


def test_a_pool_that_torch_leaves_open_is_closed(cuda: Cuda) -> None:
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
        CudaRecorder(lambda: None).record(lambda: fail(cuda))
    assert not cuda.open
    assert not cuda.used


def test_the_end_of_a_recording_fails(cuda: Cuda) -> None:
    def leave() -> None:
        cuda.apart = True

    with pytest.raises(RuntimeError, match="unjoined work"):
        CudaRecorder(cuda.rejoin).record(leave)
    assert not cuda.open
    assert not cuda.used
