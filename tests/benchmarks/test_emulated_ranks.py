"""One rank among more than there are: the others' part in it, and the whole benchmark on CPUs."""

from __future__ import annotations

from typing import Any, cast

import torch

from benchmarks import emulated_ranks
from benchmarks.commands import run_json, torchrun
from benchmarks.emulated_ranks import Echo, PairsMemory, emulated_mesh, sizes, take
from benchmarks.train_step import parse_options, run_config
from tests.distributed import run_ranks
from tests.neox_core.parallel.overlap.shared_memory import SharedMemory

TINY = ("tiny", "--tp", "4", "--tokens", "512", "--sequence-length", "64", "--steps", "3", "--gemm-seconds", "0.1")


def test_the_others_have_what_this_rank_has() -> None:
    group = Echo(1, 4)
    own, gathered = torch.arange(6.0).view(2, 3), torch.zeros(8, 3)
    group.all_gather_single(gathered, own)
    assert torch.equal(gathered, own.repeat(4, 1))
    parts = [torch.zeros(2, 3) for _ in range(4)]
    group.allgather([parts], [own])
    assert all(torch.equal(part, own) for part in parts)
    total = torch.zeros(2, 3)
    group.reduce_scatter_single(total, torch.arange(24.0).view(8, 3))
    assert torch.equal(total, torch.arange(24.0).view(4, 2, 3).sum(0))
    assert group.allreduce([own]).wait()
    assert torch.equal(own, torch.arange(6.0).view(2, 3))


def test_the_other_gpus_memory_stands_for_all_others() -> None:
    own, other = (torch.full((16,), value, dtype=torch.uint8) for value in (1, 2))
    memory = PairsMemory(1, SharedMemory([other, own]))
    found = [int(memory.get_buffer(rank, (2,), torch.uint8, 3)[0]) for rank in range(4)]
    assert found == [2, 1, 2, 2]


def test_gathers_and_sums_have_memory_of_their_own() -> None:
    config = run_config(parse_options([*TINY, "--micro-batch", "2"]), 4)
    part = 2 * 64 // 4 * config.model.hidden_size * 2
    assert sizes(config) == (part, 3 * part)
    memories = [PairsMemory(0, SharedMemory([torch.empty(size, dtype=torch.uint8)])) for size in sizes(config)]
    assert [take(memories, size).buffer_size for size in (3 * part, part)] == [3 * part, part]
    assert not memories


def emulated() -> tuple[Any, ...]:
    """The exchange of a rank that has memories, with what it was given."""
    emulated_ranks.SymmetricExchange = lambda *args: args  # type: ignore[misc, assignment]  # needs a GPU
    config = run_config(parse_options([*TINY, "--micro-batch", "2"]), 4)
    memories = [PairsMemory(1, SharedMemory([torch.empty(size, dtype=torch.uint8)] * 2)) for size in sizes(config)]
    mesh = emulated_mesh(config, 1, torch.device("cpu"), memories)
    group, device, share = cast(Any, mesh.exchange)
    found = group is mesh.tensor_group, device, share(sizes(config)[0]) is memories[0], len(memories)
    return *found, mesh.tensor_rank, mesh.tensor_size, mesh.sequence_parallel


def test_a_rank_exchanges_with_the_memory_that_it_shares() -> None:
    assert run_ranks(emulated, 1) == [(True, torch.device("cpu"), True, 2, 1, 4, True)]


def test_it_runs_on_cpus() -> None:
    found = run_json(torchrun(2, "benchmarks.emulated_ranks", *TINY))
    assert "failed" not in found, found
    assert (found["gpus"], found["tensor"], found["emulated_on_gpus"]) == (4, 4, 2)
    assert found["tokens_per_second"] > 0
    assert 0 < found["loss"] < 20
    refused = run_json(torchrun(2, "benchmarks.emulated_ranks", *TINY, "--overlap", "off"))
    assert "leave out --overlap off" in refused["failed"]
