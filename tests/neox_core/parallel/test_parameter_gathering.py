"""Updated parameters on their way to the other data-parallel ranks, and who waits for which."""

from __future__ import annotations

from typing import Any

import torch

from tests.distributed import run_ranks
from tests.neox_core.parallel.test_gradient_reduction import LAYERS, PADDED, RANKS, SIZES


def gather_all() -> dict[str, Any]:
    """What a rank has after each layer waited, and how many buckets were still under way."""
    import torch.distributed as dist

    from neox_core.parallel.parameter_gathering import OverlappedGathering

    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.group.WORLD
    assert world is not None
    flat = torch.full((PADDED,), -1.0)
    gathering = OverlappedGathering(flat, world, SIZES, LAYERS, bucket_bytes=4 * 5)
    seen: list[bool] = []
    under_way: list[int] = []
    for step in range(2):
        gathering.finish()  # of nothing at first
        expected = torch.arange(PADDED) + 100.0 * step
        flat[12 * rank : 12 * (rank + 1)] = expected[12 * rank : 12 * (rank + 1)]
        gathering.begin()
        under_way = [gathering.buckets_under_way]
        for layer, end in ((0, 7), (2, 16), (3, 31), (5, 31), (7, 34)):  # layer 5 has no parameters here
            gathering.wait_for(layer)
            under_way.append(gathering.buckets_under_way)
            seen.append(torch.equal(flat[:end], expected[:end]))
    gathering.finish()
    seen.append(torch.equal(flat, torch.arange(PADDED) + 100.0))
    dist.destroy_process_group()
    return {"seen": seen, "under way": under_way, "left": gathering.buckets_under_way}


def test_a_layer_waits_for_its_own_and_those_before_it() -> None:
    for rank in run_ranks(gather_all, RANKS):
        assert rank["seen"] == [True] * 11
        # [0,5) [5,10) [10,12) of the first owner, [12,17) [17,22) [22,24) of the second, [24,29) [29,34) [34,36) of the
        # last: what fills it up comes with the last layer.
        assert rank["under way"] == [9, 7, 5, 1, 1, 0]
        assert rank["left"] == 0
