"""The bucketed sum over data-parallel ranks against a reduce-scatter of everything at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed import run_ranks

RANKS = 3
SIZES = [7, 5, 4, 9, 6, 3]
LAYERS = [0, 2, 2, 3, 3, 7]
"""Two parameters in layers 2 and 3: elements 7 to 16 and 16 to 31 of 34."""
PADDED = 36


def reduce_all() -> dict[str, Any]:
    """What one rank ends with, and how many buckets were under way after each gradient of the last backward pass."""
    import torch.distributed as dist

    from neox_core.parallel.gradient_reduction import OverlappedReduction

    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.group.WORLD
    assert world is not None
    gradient = torch.randn(PADDED, generator=torch.Generator().manual_seed(rank))
    flat = gradient.clone()
    reduction = OverlappedReduction(flat, world, SIZES, LAYERS, bucket_bytes=4 * 5)
    results: list[Tensor] = []
    under_way: list[int] = []
    for step in range(2):  # the second step finds nothing left of the first
        flat.copy_(gradient * (step + 1))
        reduction.on_gradient(5)  # an earlier micro batch
        assert reduction.buckets_under_way == 0
        reduction.begin()
        under_way = []
        for parameter in (5, 4, 3, 1, 2, 0):
            reduction.on_gradient(parameter)
            under_way.append(reduction.buckets_under_way)
        reduction.finish()
        results.append(flat[12 * rank : 12 * (rank + 1)].clone())
    reduction.begin()
    reduction.on_gradient(3)
    with pytest.raises(RuntimeError, match="gradient of parameter 5 came after its reduction began"):
        reduction.on_gradient(5)
    reduction.finish()
    own = torch.empty(12)
    dist.reduce_scatter_tensor(own, gradient / RANKS)
    dist.destroy_process_group()
    return {"first": results[0], "second": results[1], "expected": own, "under way": under_way}


def test_buckets_go_to_their_owners_while_gradients_come() -> None:
    for rank in run_ranks(reduce_all, RANKS):
        torch.testing.assert_close(rank["first"], rank["expected"], rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(rank["second"], 2 * rank["expected"], rtol=1e-6, atol=1e-7)
        # From the end: [31,36) [26,31) [24,26) of the last owner, [19,24) [14,19) [12,14) of the second, [7,12) [2,7)
        # [0,2) of the first. Layer 7 ends at 34, layer 3 at 31, layer 2 at 16, layer 0 at 7.
        assert rank["under way"] == [0, 1, 1, 4, 4, 7]
