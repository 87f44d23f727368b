"""The collectives of training through NCCL, in a group of one rank: kinds of operation, shapes, dtypes and streams.

pytest -m gpu tests/gpu
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from neox_core.parallel.gradient_reduction import OverlappedReduction
from neox_core.parallel.parameter_gathering import OverlappedGathering
from neox_core.parallel.replicas import ReplicatedGradients
from neox_core.parallel.tensor_parallel import gather_tokens, scatter_sum

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[dist.ProcessGroup]:
    """An NCCL group of this process alone."""
    dist.init_process_group("nccl", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    group = dist.group.WORLD
    assert group is not None
    yield group
    dist.destroy_process_group()


def test_reduction_beside_the_backward_pass(one_rank: dist.ProcessGroup) -> None:
    """A bucket sees what was added to it on the current stream before, and no more is needed than `finish`."""
    flat = torch.zeros(1 << 24, device="cuda")
    sizes = [1 << 22] * 4
    reduction = OverlappedReduction(flat, one_rank, sizes, layers=[0, 1, 2, 3], bucket_bytes=1 << 20)
    reduction.begin()
    for parameter in (3, 2, 1, 0):
        flat[parameter << 22 : (parameter + 1) << 22].add_(parameter + 1.0)
        reduction.on_gradient(parameter)
    assert reduction.buckets_under_way == 48
    reduction.finish()
    expected = torch.arange(1.0, 5.0).repeat_interleave(1 << 22)
    assert torch.equal(flat.cpu(), expected)


def test_a_recorded_pass_waits_for_parameters(one_rank: dist.ProcessGroup) -> None:
    """Each replay for those of its own step, whenever they come, though the host is steps ahead of the GPU."""
    flat, seen = torch.zeros(1 << 20, device="cuda"), torch.zeros(1 << 20, device="cuda")
    gathering = OverlappedGathering(flat, one_rank, [1 << 19] * 2, layers=[0, 1], bucket_bytes=1 << 20)
    graph, stream, late = torch.cuda.CUDAGraph(), torch.cuda.Stream(), gathering._stream
    assert late is not None
    with torch.cuda.graph(graph, stream=stream):
        for layer in (0, 1):
            gathering.wait_for(layer)
            seen.chunk(2)[layer].copy_(flat.chunk(2)[layer])
    found = []
    for step in range(1, 4):
        with torch.cuda.stream(stream):
            gathering.begin()
            late.wait_stream(stream)
            for layer, arrival in ((0, gathering._arrivals[1]), (1, gathering._arrivals[3])):
                with torch.cuda.stream(late):
                    torch.cuda._sleep(100_000_000)  # cycles: some 50 ms
                    flat.chunk(2)[layer].fill_(step)
                    arrival.record()
            graph.replay()
            found.append(seen.clone())
    torch.cuda.synchronize()
    assert [x.unique().tolist() for x in found] == [[1.0], [2.0], [3.0]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_tokens_are_gathered_and_scattered(one_rank: dist.ProcessGroup, dtype: torch.dtype) -> None:
    x = torch.randn(2, 8, 16, device="cuda", dtype=dtype, requires_grad=True)
    y = scatter_sum(gather_tokens(x, one_rank), one_rank)
    y.backward(torch.ones_like(y).transpose(0, 1).contiguous().transpose(0, 1))
    assert torch.equal(y, x)
    assert x.grad is not None
    assert bool((x.grad == 1).all())


def test_shared_gradients(one_rank: dist.ProcessGroup) -> None:
    gradient = torch.arange(12.0, device="cuda")
    shared = ReplicatedGradients(gradient, 0, [range(2, 5), range(7, 9)], one_rank)
    shared.sum()
    assert torch.equal(gradient.cpu(), torch.arange(12.0))
