"""One rank among more than there are: the others' part in it, and the whole benchmark on CPUs."""

from __future__ import annotations

import torch

from benchmarks.commands import run_json, torchrun
from benchmarks.emulated_ranks import Echo, PairsMemory, sizes, take
from benchmarks.train_step import parse_options, run_config
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


def test_it_runs_on_cpus() -> None:
    found = run_json(torchrun(2, "benchmarks.emulated_ranks", *TINY))
    assert "failed" not in found, found
    assert (found["gpus"], found["tensor"], found["emulated_on_gpus"]) == (4, 4, 2)
    assert found["tokens_per_second"] > 0
    assert 0 < found["loss"] < 20
    refused = run_json(torchrun(2, "benchmarks.emulated_ranks", *TINY, "--overlap", "off"))
    assert "leave out --overlap off" in refused["failed"]
