"""Speed of one rank's training step among more tensor-parallel ranks than there are GPUs, on two of them.

    torchrun --nproc_per_node 2 -m benchmarks.emulated_ranks 34b-slice --tp 8 --micro-batch 8
    torchrun --nproc_per_node 2 -m benchmarks.emulated_ranks 7b --tp 4 --micro-batch 8

Each GPU is one rank of --tp, and does all that such a rank does: its part of every product, its copies, its optimizer.
What it fetches from the others, it fetches from the one other GPU, whose memory stands for that of each of them: the
same bytes through the same link into and out of a GPU. Options and figures are those of benchmarks/train_step.py;
losses mean nothing.

What is missing: others than the exchanges alongside products (the sums of the embedding, the loss and the norms) cost
nothing, a barrier has two ranks to wait for, and of --tp GPUs one is the slowest. So it is the most that real ranks can
reach. To see how much that is, compare --tp 2 with benchmarks/train_step.py.
"""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.commands import require_ranks
from benchmarks.train_step import checked, measure, parse_options, report, run_config, slowest_gemm
from neox_core.config import RunConfig
from neox_core.parallel.overlap.symmetric import SymmetricExchange, shared_memory, why_not
from neox_core.parallel.ranks.mesh import Mesh, build_mesh, init_distributed

ECHO = "echo"


class Done(dist.Work):
    """What has nothing to wait for."""

    def wait(self, timeout: timedelta | None = None) -> bool:  # type: ignore[override]
        """Not at all."""
        return True


class Echo(dist.ProcessGroup):
    """A group whose other ranks have for this one what it has for them; of which sums take nothing."""

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> dist.Work:
        """As if the others had zeros."""
        return Done()

    def broadcast(self, tensors: list[Tensor], opts: Any = None) -> dist.Work:
        """From a rank that has the same."""
        return Done()

    def barrier(self, opts: Any = None) -> dist.Work:
        """All are there."""
        return Done()

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> dist.Work:
        """Everyone's is this rank's."""
        for output in outputs[0]:
            output.copy_(inputs[0])
        return Done()

    def all_gather_single(self, output: Tensor, own: Tensor, opts: Any = None) -> dist.Work:
        """As `allgather`, into one tensor."""
        output.view(self.size(), -1).copy_(own.view(1, -1))
        return Done()

    def reduce_scatter_single(self, output: Tensor, whole: Tensor, opts: Any = None) -> dist.Work:
        """Others have for this rank what it has for them."""
        torch.sum(whole.view(self.size(), -1), 0, out=output.view(-1))
        return Done()

    _allgather_base, _reduce_scatter_base = all_gather_single, reduce_scatter_single  # their names before torch 2.13


class PairsMemory:
    """Memory that two ranks share, in which the other's stands for that of all others.

    Args:
        rank: which of the two this is, and of the emulated ranks.
        memory: theirs.
    """

    def __init__(self, rank: int, memory: Any) -> None:
        self._rank, self._memory = rank, memory
        self.buffer_size: int = memory.buffer_size

    def get_buffer(self, rank: int, shape: tuple[int, ...], dtype: torch.dtype, offset: int = 0) -> Tensor:
        """A rank's."""
        real = rank if rank == self._rank else 1 - self._rank
        buffer: Tensor = self._memory.get_buffer(real, shape, dtype, offset)
        return buffer

    def barrier(self, channel: int) -> None:
        """Of the two."""
        self._memory.barrier(channel=channel)


def main() -> None:
    """Run the benchmark and print its figures."""
    options = parse_options()
    require_ranks("benchmarks.emulated_ranks", options.model)
    if os.environ["WORLD_SIZE"] != "2" or options.tp < 2 or options.pp > 1:
        sys.exit("two GPUs emulate the ranks of one stage: start it with --nproc_per_node 2, and give --tp but no --pp")
    if options.overlap == "off":
        sys.exit("exchanges that nothing overlaps with would cost nothing here: leave out --overlap off")
    logging.basicConfig(level=logging.WARNING)
    config = checked(run_config(options, options.tp))
    device = init_distributed(config.launch)
    gemm = slowest_gemm(config, device, options.gemm_seconds)
    memories, rank = shared_with_the_other(config, device), dist.get_rank()
    dist.destroy_process_group()
    result = measure(config, emulated_mesh(config, rank, device, memories), gemm, options)
    if rank == 0:
        report(result | {"emulated_on_gpus": 2})
    sys.stdout.flush()
    dist.destroy_process_group()


def shared_with_the_other(config: RunConfig, device: torch.device) -> list[PairsMemory]:
    """What exchanges use; nothing on CPUs, where there are none. Collective over the two."""
    group = dist.group.WORLD
    assert group is not None
    if device.type == "cpu":
        return []
    if reason := why_not(group, device):
        sys.exit(f"the two GPUs cannot exchange by copies, since {reason}")
    return [PairsMemory(dist.get_rank(), shared_memory(group, device, size)) for size in sizes(config)]


def sizes(config: RunConfig) -> tuple[int, int]:
    """Bytes that a gather and a sum need to share."""
    tokens = config.train.micro_batch_size * config.train.sequence_length
    part = tokens // config.parallel.tensor * config.model.hidden_size * torch.bfloat16.itemsize
    return part, part * (config.parallel.tensor - 1)


def emulated_mesh(config: RunConfig, rank: int, device: torch.device, memories: list[PairsMemory]) -> Mesh:
    """A rank's, among those that are not there; with memories that are shared in turn, as exchanges ask for them."""
    dist.Backend.register_backend(ECHO, _echo, devices=["cpu", "cuda"])
    store = dist.HashStore()
    dist.init_process_group(ECHO, rank=rank, world_size=config.parallel.tensor, store=store)
    mesh = build_mesh(config.parallel.model_copy(update={"overlap": "off"}), device)
    exchange = SymmetricExchange(mesh.tensor_group, device, partial(take, list(memories))) if memories else None
    return replace(mesh, exchange=exchange)


def take(memories: list[PairsMemory], size: int) -> PairsMemory:
    """The first that is large enough, which is then no longer there."""
    found = next(memory for memory in memories if memory.buffer_size >= size)
    memories.remove(found)
    return found


def _echo(store: dist.Store, rank: int, size: int, timeout: timedelta) -> Echo:
    return Echo(rank, size)


if __name__ == "__main__":
    main()
