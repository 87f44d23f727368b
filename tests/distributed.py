"""Runs a function in several processes that form a torch.distributed world on loopback."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import time
import traceback
from collections.abc import Callable, Collection
from queue import Empty
from typing import Any

PATIENCE_SECONDS = 540.0
"""Under pytest's own limit of 600, and far above what ranks take on a busy machine."""
_LOOK_SECONDS = 1.0


def run_ranks(
    function: Callable[..., Any], world_size: int, *args: Any, timeout: float = PATIENCE_SECONDS
) -> list[Any]:
    """Call `function(*args)` on every rank with torchrun's environment variables; returns the results by rank."""
    context = _process_context()
    queue = context.Queue()
    (port,) = rendezvous_ports(1)
    environment = os.environ | {
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store is this process's, as with torchrun
    }
    processes = [
        context.Process(target=_rank, args=(function, rank, environment, queue, args), daemon=True)
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    results: dict[int, Any] = {}
    try:
        while len(results) < world_size:
            rank, result, error = _next_result(processes, results, queue, timeout)
            if error is not None:
                raise AssertionError(f"rank {rank} of {world_size} failed:\n{error}")
            results[rank] = pickle.loads(result)
    finally:
        for process in processes:
            process.join(timeout=10 if len(results) == world_size else 0)
            process.kill()
    return [results[rank] for rank in range(world_size)]


def _next_result(processes: list[Any], results: Collection[int], queue: Any, timeout: float) -> Any:
    """What the next rank has put into the queue. One that has ended without a word will not, and is not waited for."""
    deadline = time.monotonic() + timeout
    while True:
        missing = [rank for rank in range(len(processes)) if rank not in results]
        ended = [rank for rank in missing if not processes[rank].is_alive()]  # before the queue, which it may have used
        try:
            return queue.get(timeout=_LOOK_SECONDS)
        except Empty:
            assert not ended, f"rank {ended[0]} has ended with exit code {processes[ended[0]].exitcode}, without a word"
            assert time.monotonic() < deadline, f"ranks {missing} have not returned within {timeout:.0f} s"


def killed_ranks(function: Callable[..., Any], world_size: int, *args: Any) -> list[int | None]:
    """Call `function(*args)` on ranks that end themselves on the way; their exit codes."""
    context = _process_context()
    queue = context.Queue()
    environment = os.environ | {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1"}
    environment |= {"TORCHELASTIC_USE_AGENT_STORE": "True"}
    processes = [
        context.Process(target=_rank, args=(function, rank, environment, queue, args), daemon=True)
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    deadline = time.monotonic() + PATIENCE_SECONDS
    for process in processes:
        process.join(deadline - time.monotonic())
        process.kill()
    return [process.exitcode for process in processes]


def rendezvous_ports(count: int) -> list[int]:
    """Ports of stores through which ranks find each other, one for each process group.

    This process listens there until it ends, so that no other can take a port before the ranks come.
    """
    from torch.distributed import TCPStore

    stores = [TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) for _ in range(count)]
    _STORES.extend(stores)
    return [store.port for store in stores]


_STORES: list[Any] = []
"""A store ends with its object."""


def _process_context() -> Any:
    """Ranks are forks of one process that has imported torch and DeepSpeed, where imports do not touch a GPU."""
    import torch

    if torch.cuda.is_available():  # DeepSpeed looks for GPUs when it is imported, after which CUDA allows no fork
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.rank_imports"])  # before the first process; later calls change nothing
    return context


def _rank(
    function: Callable[..., Any], rank: int, environment: dict[str, str], queue: Any, args: tuple[Any, ...]
) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ.clear()  # a fork has the environment of the process that it comes from
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
    if 0 < torch.cuda.device_count() < int(environment["WORLD_SIZE"]):
        os.environ.update(_sharing_gpus(rank))
    try:
        # By value: torch would send tensors as handles of memory that is gone when this process ends.
        queue.put((rank, pickle.dumps(function(*args)), None))
    except BaseException:
        queue.put((rank, None, traceback.format_exc()))


def _sharing_gpus(rank: int) -> dict[str, str]:
    """For more ranks than GPUs: right results, at the speed of sockets.

    NCCL refuses two ranks of one host on one GPU, so each rank passes for a host of its own.
    """
    return {
        "NCCL_HOSTID": f"rank {rank}",
        "NCCL_SOCKET_IFNAME": "lo",
        "NCCL_IB_DISABLE": "1",
        "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES": "1",
    }
