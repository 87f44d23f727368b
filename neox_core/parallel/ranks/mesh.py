"""Who computes what: the ranks as a grid of pipeline stage x data-parallel rank x tensor-parallel rank."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist

from neox_core.config.schema import LaunchConfig, ParallelConfig
from neox_core.errors import ConfigError, LaunchError
from neox_core.parallel.overlap.exchange import Exchange
from neox_core.parallel.overlap.symmetric import SymmetricExchange, why_not

logger = logging.getLogger(__name__)

_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""As torchrun sets them."""
_TIMEOUT = timedelta(minutes=10)
"""Of a collective in the group of all ranks."""

Axis = Literal["tensor", "pipeline", "data"]


@dataclass(frozen=True)
class Mesh:
    """This rank's place in the grid. Tensor-parallel ranks are neighbours, so that they share a node.

    rank = (pipeline_rank x data_size + data_rank) x tensor_size + tensor_rank.
    """

    rank: int
    local_rank: int
    """Index among the ranks of this node."""
    world_size: int
    tensor_rank: int
    tensor_size: int
    pipeline_rank: int
    pipeline_size: int
    data_rank: int
    data_size: int
    tensor_group: dist.ProcessGroup
    device: torch.device
    sequence_parallel: bool = False
    """Tensor-parallel ranks split the tokens between attention and MLP."""
    exchange: Exchange | None = None
    """How tensor-parallel ranks exchange tokens alongside their products; None: they don't."""

    @property
    def layout(self) -> dict[str, int]:
        """Degrees of parallelism, as checkpoints record them."""
        return {"tensor": self.tensor_size, "pipeline": self.pipeline_size, "data": self.data_size}

    def peers(self, axis: Axis) -> range:
        """The ranks that differ from this one along an axis only, itself included, in order."""
        own, size, step = {
            "tensor": (self.tensor_rank, self.tensor_size, 1),
            "data": (self.data_rank, self.data_size, self.tensor_size),
            "pipeline": (self.pipeline_rank, self.pipeline_size, self.tensor_size * self.data_size),
        }[axis]
        first = self.rank - own * step
        return range(first, first + size * step, step)


def init_distributed(launch: LaunchConfig, patience_minutes: float = 0.0) -> torch.device:
    """Join the process group that RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT describe, unless this
    process has joined it before.

    Args:
        launch: `device` is 'cuda' (NCCL), 'cpu' (gloo) or 'auto'; on CPUs, each rank gets `cpus_per_rank` threads.
        patience_minutes: for which a rank may keep the others waiting in addition, as the object store is away.

    Raises:
        LaunchError: a variable is missing, or CUDA is demanded and absent.
    """
    if missing := [name for name in _VARIABLES if name not in os.environ]:
        raise LaunchError(
            f"environment variables {missing} are not set: start with torchrun, or through the train flow"
        )
    if launch.device == "cuda" and not torch.cuda.is_available():
        raise LaunchError("launch.device is 'cuda' but this rank sees no GPU: request GPUs or set launch.device: cpu")
    timeout = _TIMEOUT + timedelta(minutes=patience_minutes)
    use_cuda = launch.device == "cuda" or (launch.device == "auto" and torch.cuda.is_available())
    # Read when CUDA is first used: without it, a full card cannot give freed blocks to larger tensors.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    # NCCL would register the buffers of a graph's collectives, which fails for such segments.
    os.environ.setdefault("NCCL_GRAPH_REGISTER", "0")
    # torch says on every rank that what stages send goes one after the other: in the schedule's order, as it must.
    os.environ.setdefault("TORCH_NCCL_SHOW_EAGER_INIT_P2P_SERIALIZATION_WARNING", "false")
    if use_cuda:
        # A launcher that shows each task only its own GPU leaves exactly one visible.
        device = torch.device("cuda", _local_rank() % torch.cuda.device_count())
        torch.cuda.set_device(device)
        # CUDA graphs cannot be recorded on the default stream, and autograd runs a node on the stream it was made on.
        torch.cuda.set_stream(torch.cuda.Stream())  # type: ignore[no-untyped-call]
        # With a device, NCCL connects at once; a rank that is alone has nobody to connect to.
        _join("nccl", timeout, device if os.environ["WORLD_SIZE"] != "1" else None)
    else:
        device = torch.device("cpu")
        # Read when the engine is first imported; without a GPU it would otherwise probe for other accelerators.
        os.environ["DS_ACCELERATOR"] = "cpu"
        _join("gloo", timeout)
        # torch would give every rank as many threads as the machine has cores.
        torch.set_num_threads(launch.cpus_per_rank)
    dist.barrier()  # NCCL takes its memory at the first collective: now, while there is some
    return device


def _join(backend: str, timeout: timedelta, device: torch.device | None = None) -> None:
    if not dist.is_initialized():
        dist.init_process_group(backend, timeout=timeout, device_id=device)


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def build_mesh(parallel: ParallelConfig, device: torch.device) -> Mesh:
    """Place this rank in the grid and make its tensor-parallel group. Collective over all ranks.

    Raises:
        ConfigError: TP x PP does not divide the world size.
    """
    world_size, rank = dist.get_world_size(), dist.get_rank()
    data_size, remainder = divmod(world_size, parallel.tensor * parallel.pipeline)
    if remainder:
        raise ConfigError(
            f"world size {world_size} is not divisible by parallel.tensor {parallel.tensor} x "
            f"parallel.pipeline {parallel.pipeline}"
        )
    replica, tensor_rank = divmod(rank, parallel.tensor)
    pipeline_rank, data_rank = divmod(replica, data_size)
    group = neighbours_group(parallel.tensor)
    sequence = parallel.sequence and parallel.tensor > 1
    return Mesh(
        rank=rank,
        local_rank=_local_rank(),
        world_size=world_size,
        tensor_rank=tensor_rank,
        tensor_size=parallel.tensor,
        pipeline_rank=pipeline_rank,
        pipeline_size=parallel.pipeline,
        data_rank=data_rank,
        data_size=data_size,
        tensor_group=group,
        device=device,
        sequence_parallel=sequence,
        exchange=_exchange(group, device) if sequence and parallel.overlap == "auto" else None,
    )


def _exchange(group: dist.ProcessGroup, device: torch.device) -> Exchange | None:
    if reason := why_not(group, device):
        logger.info("parallel.overlap: off, since %s", reason)
        return None
    return SymmetricExchange(group, device)


def neighbours_group(size: int) -> dist.ProcessGroup:
    """The group of `size` consecutive ranks that this rank is in. Every rank makes every group, in order."""
    groups = [dist.new_group(list(range(first, first + size))) for first in range(0, dist.get_world_size(), size)]
    return groups[dist.get_rank() // size]
