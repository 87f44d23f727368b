"""Exchanges by the GPUs' copy engines: a block's results are those of collectives, also from a CUDA graph.

pytest -m multi_gpu tests/gpu/test_overlap.py
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, get_args

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from neox_core.config import ActivationCheckpointing, LaunchConfig
from neox_core.model import ModelDimensions
from neox_core.parallel.overlap.exchange import Kind
from neox_core.parallel.overlap.symmetric import ROWS, SymmetricExchange, shared_memory, why_not
from tests.distributed import run_ranks
from tests.gpu.several import DEVICE, MARKS, RANKS
from tests.neox_core.parallel.overlap.blocks import run_block

MODES: tuple[ActivationCheckpointing, ...] = get_args(ActivationCheckpointing)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
DIMS = ModelDimensions(
    hidden_size=1024, num_heads=8, num_kv_heads=8, head_dim=128, intermediate_size=2048, vocab_size=8,
    rope_theta=1e4, norm_eps=1e-5, sequence_length=0,
)  # fmt: skip
TOGETHER = {"all peers": 8, "two peers": 2, "one peer": 1}
"""So many peers' rows are multiplied together, where there are as many."""

pytestmark = [*MARKS, pytest.mark.skipif(DEVICE != "cuda", reason="copy engines are those of GPUs")]
Late = Literal["nothing", "copies", "one rank's copies", "one rank's products"]
"""What lags behind, so that what does not wait for it is wrong."""
LATE: tuple[Late, ...] = get_args(Late)
CYCLES = 10_000_000
"""By which it does, at each exchange: some milliseconds, in which the others would do all that is left of a block."""


class LaggingExchange(SymmetricExchange):
    """One whose streams are late on purpose."""

    late: Late = "nothing"

    def _begin(self, kind: Kind, size: int) -> Any:
        memory = super()._begin(kind, size)
        if self.late == "copies" or (self.late == "one rank's copies" and self.rank == 1):
            with torch.cuda.stream(self.stream):
                torch.cuda._sleep(CYCLES)  # type: ignore[no-untyped-call]
        if self.late == "one rank's products" and self.rank == 1:
            torch.cuda._sleep(CYCLES)  # type: ignore[no-untyped-call]
        return memory


def joined() -> LaggingExchange:
    from neox_core.parallel.ranks.mesh import init_distributed

    device = init_distributed(LaunchConfig(device="cuda"))
    group = dist.group.WORLD
    assert group is not None
    assert why_not(group, device) is None
    return LaggingExchange(group, device)


def difference(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def blocks(together: int) -> dict[Any, list[str]]:
    """What differs by more than rounding, of runs in which memory is used again and again, whatever is late."""
    exchange, found = joined(), dict[Any, list[str]]()
    rows = ROWS // together
    dims = replace(DIMS, sequence_length=rows * exchange.size // 2)  # a block has two sequences
    for dtype, tolerance in TOLERANCE.items():
        for mode in MODES:
            expected = run_block(dims, mode, None, "cuda", dtype)
            runs = []
            for late in 2 * LATE:
                exchange.late = late
                runs.append((late, run_block(dims, mode, exchange, "cuda", dtype)))
            found[dtype, mode] = [
                f"late: {late}, {name}: {error}"
                for late, run in runs
                for name in expected.keys() - {"called"}
                if not (error := difference(run[name], expected[name])) < tolerance
            ]
    dist.destroy_process_group()
    return found


@pytest.mark.parametrize("together", TOGETHER.values(), ids=TOGETHER)
def test_a_block(together: int) -> None:
    for found in run_ranks(blocks, RANKS, together):
        assert set(found) == {(dtype, mode) for dtype in TOLERANCE for mode in MODES}
        assert not any(found.values()), found


def replays() -> list[float]:
    """Largest differences of gathered rows and summed products, replayed with new values each time."""
    exchange = joined()
    rank, size = dist.get_rank(), dist.get_world_size()
    rows, total = (torch.zeros(512, 1024, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    gathered = torch.zeros(size * 512, 1024, device="cuda", dtype=torch.bfloat16)

    def once() -> None:
        gathering = exchange.begin_gather(rows)
        for there, values in gathering.arrivals():
            gathered[there] = values
        gathered.copy_((gathered + gathering.whole_ND) / 2)
        scattering = exchange.begin_scatter(512, 1024, torch.bfloat16)
        for there, place in scattering.sends():
            torch.add(gathered[there], rank, out=place)
        torch.add(gathered[rank * 512 : (rank + 1) * 512], rank, out=total)
        for other in scattering.others():
            total.add_(other)

    once()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
        once()
    differences = []
    for turn in range(200):
        rows.fill_(float(8 * (turn % 4) + rank))
        graph.replay()
        own = 8 * (turn % 4) + torch.arange(size, device="cuda").repeat_interleave(512)
        differences += [
            float((gathered - own[:, None]).abs().max()),
            float((total - sum(8 * (turn % 4) + rank + other for other in range(size))).abs().max()),
        ]
    torch.cuda.synchronize()
    dist.destroy_process_group()
    return differences


def test_replayed_exchanges() -> None:
    """Values are small integers, which bf16 holds."""
    for differences in run_ranks(replays, RANKS):
        assert len(differences) == 400
        assert max(differences) == 0


def spoiled_blocks() -> int:
    """Of small tensors that work under way reads, and which are let go of: how many shared memory has written to."""
    from neox_core.parallel.ranks.mesh import init_distributed

    device, group = init_distributed(LaunchConfig(device="cuda")), dist.group.WORLD
    assert group is not None
    ones = [torch.ones(64, dtype=torch.uint8, device=device) for _ in range(4096)]  # wherever a small one has room
    torch.stack(ones[::2]).sum()  # CUDA waits for all work where it first loads a kernel: here, and
    kept = shared_memory(group, device, 1024)
    kept.barrier(channel=0)
    torch.cuda._sleep(4_000_000_000)  # type: ignore[no-untyped-call]  # cycles: two seconds
    read = torch.stack(ones[::2])
    del ones[::2]
    shared_memory(group, device, 2048)
    spoiled = int((read != 1).any(dim=1).sum())
    dist.destroy_process_group()
    return spoiled


def test_memory_is_shared_without_touching_what_work_under_way_reads() -> None:
    assert run_ranks(spoiled_blocks, RANKS) == [0] * RANKS
