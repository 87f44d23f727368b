"""Measures a node: products, attention, copies and exchanges on all of its GPUs at once, as training has them.

The slowest GPU counts. Where there is no GPU, two processes on CPUs are measured, for a trial.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from time import perf_counter

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from neox_core.config import ModelConfig, RunConfig
from neox_core.kernels.attention import AUTO, attention_function
from neox_core.planning.hardware import CARDS, Hardware, Link

_SIZES = (1 << 18, 1 << 22, 1 << 23, 1 << 24, 1 << 25, 1 << 26, 1 << 28)
"""Bytes that each rank sends."""
_ALIGNED = 128
"""Bytes that each rank's part is a multiple of, as in training: NCCL is slower where addresses are not aligned."""
_TIMEOUT = timedelta(minutes=3)
"""Of an exchange: a node whose GPUs do not reach each other says so soon."""
_COPY_BYTES = 1 << 30
_CPU_GIB = 16.0
_SHRUNK = 64
"""By which sizes are smaller on CPUs."""


def calibrate(config: RunConfig, seconds: float = 8.0) -> Hardware:
    """Figures of this node at a run's shapes. What one node cannot tell is that of the known card most like it.

    Args:
        seconds: of matrix products, until the cards are as warm as in training.
    """
    on_gpus = torch.cuda.is_available()
    ranks = torch.cuda.device_count() if on_gpus else 2
    with tempfile.TemporaryDirectory() as folder:
        arguments = (ranks, folder, config, seconds)
        spawn(_measure, arguments, ranks)  # type: ignore[no-untyped-call]
        found = json.loads((Path(folder) / "found").read_text())
    link = found.pop("link")
    base = replace(_like(found["name"], found["memory_gib"]), **found)
    if not on_gpus:
        base = replace(base, peak=base.gemm)
    return replace(base, link=Link(tuple(map(tuple, link)))) if link else base


def sustained_gemm(model: ModelConfig, tensor: int, tokens: int, device: torch.device, seconds: float) -> float:
    """FLOP/s of a rank's matrix products (forward, input gradient, weight gradient), over the second half of the time.

    Args:
        tensor: ranks that share each matrix.
        tokens: of a micro batch.
    """
    fused = (model.num_attention_heads + 2 * model.num_kv_heads) * model.head_dim // tensor
    width = model.num_attention_heads * model.head_dim // tensor
    h, f = model.hidden_size, model.intermediate_size // tensor
    shapes = [(fused, h), (h, width), (f, h), (f, h), (h, f)]
    weights = [torch.randn(shape, device=device).bfloat16() for shape in shapes]
    inputs = {size: torch.randn(tokens, size, device=device).bfloat16() for shape in shapes for size in shape}

    def once() -> None:
        for weight in weights:
            out, into = weight.shape
            inputs[into] @ weight.t()
            inputs[out] @ weight
            inputs[out].t() @ inputs[into]

    flops = 3 * sum(2 * tokens * out * into for out, into in shapes)
    _rate(once, flops, device, seconds / 2)
    return _rate(once, flops, device, seconds / 2)


def _measure(rank: int, ranks: int, folder: str, config: RunConfig, seconds: float) -> None:
    on_gpus = torch.cuda.is_available()
    device = torch.device("cuda", rank) if on_gpus else torch.device("cpu")
    if on_gpus:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    backend, meeting = "nccl" if on_gpus else "gloo", f"file://{folder}/store"
    dist.init_process_group(backend, meeting, _TIMEOUT, rank=rank, world_size=ranks)
    shrunk = 1 if on_gpus else _SHRUNK
    tokens = config.train.micro_batch_size * config.train.sequence_length // shrunk
    gemm = sustained_gemm(config.model, config.parallel.tensor, tokens, device, seconds)
    if on_gpus:
        torch.cuda.empty_cache()
    length = max(128, config.train.sequence_length // shrunk)
    copied = _copy(device, _COPY_BYTES // shrunk, seconds / 8)
    found = [gemm, *_attention(config, length, device, seconds / 8), copied]
    rates = torch.tensor(found, dtype=torch.float64, device=device)
    dist.all_reduce(rates, dist.ReduceOp.MIN)
    link = _link(device, ranks, shrunk) if ranks > 1 else []
    if rank == 0:
        names = ("gemm", "attention_forward", "attention_backward", "memory")
        memory = torch.cuda.get_device_properties(device).total_memory / 2**30 if on_gpus else _CPU_GIB
        # The name is asked here, since who asks may keep some of the GPU's memory until it ends.
        named = {"name": torch.cuda.get_device_name(device) if on_gpus else "cpu"}
        figures = named | dict(zip(names, rates.tolist(), strict=True)) | {"memory_gib": memory, "link": link}
        (Path(folder) / "found").write_text(json.dumps(figures))
    dist.barrier()
    dist.destroy_process_group()


def _attention(config: RunConfig, tokens: int, device: torch.device, seconds: float) -> tuple[float, float]:
    """FLOP/s of causal attention, forward and backward, of one tensor-parallel rank's heads."""
    model, ranks = config.model, config.parallel.tensor
    attend = attention_function(AUTO, device.type, torch.bfloat16)
    heads, kv_heads = model.num_attention_heads // ranks, max(1, model.num_kv_heads // ranks)
    q, k, v = (
        torch.randn(1, tokens, count, model.head_dim, device=device).bfloat16().requires_grad_()
        for count in (heads, kv_heads, kv_heads)
    )
    flops = 2 * heads * model.head_dim * tokens**2
    result = attend(q, k, v)
    gradient = torch.randn_like(result)

    def both() -> None:
        torch.autograd.grad(attend(q, k, v), (q, k, v), gradient)

    def forward() -> Tensor:
        with torch.no_grad():
            return attend(q, k, v)

    seconds_forward = flops / _rate(forward, flops, device, seconds)
    seconds_both = flops / _rate(both, flops, device, seconds)
    return flops / seconds_forward, 2.5 * flops / max(seconds_both - seconds_forward, 0.1 * seconds_both)


def _copy(device: torch.device, size: int, seconds: float) -> float:
    """Bytes/s of a copy, read and written."""
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return _rate(lambda: target.copy_(source), 2 * size, device, seconds)


def _link(device: torch.device, ranks: int, shrunk: int) -> list[tuple[float, float]]:
    """(bytes that each rank sends, seconds of a gathering), the slowest rank's, from 0 bytes on."""
    points = []
    for length in part_bytes(ranks, shrunk):
        part = torch.zeros(length, dtype=torch.uint8, device=device)
        whole = torch.empty(ranks * part.numel(), dtype=torch.uint8, device=device)
        for _ in range(3):
            dist.all_gather_into_tensor(whole, part)
        dist.barrier()
        synchronize(device)
        start = perf_counter()
        for _ in range(10):
            dist.all_gather_into_tensor(whole, part)
        synchronize(device)
        taken = torch.tensor((perf_counter() - start) / 10, dtype=torch.float64, device=device)
        dist.all_reduce(taken, dist.ReduceOp.MAX)
        points.append((float(part.numel() * (ranks - 1)), float(taken)))
    (a, at_a), (b, at_b) = points[:2]
    latency = max(0.2 * at_a, at_a - a * (at_b - at_a) / (b - a))
    return [(0.0, latency), *points]


def part_bytes(ranks: int, shrunk: int = 1) -> list[int]:
    """What each of the ranks has, smallest first, that all of them gather."""
    return [size // shrunk // (ranks - 1) // _ALIGNED * _ALIGNED for size in _SIZES]


def _rate(work: Callable[[], object], amount: float, device: torch.device, seconds: float) -> float:
    """Amount per second of what is done again and again for so long."""
    work()
    synchronize(device)
    start, count = perf_counter(), 0
    while perf_counter() - start < seconds:
        for _ in range(8):
            work()
        count += 8
        synchronize(device)
    return count * amount / (perf_counter() - start)


def synchronize(device: torch.device) -> None:
    """Wait for the device, where that is one of its own."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _like(name: str, memory_gib: float) -> Hardware:
    """The known card that is most like one of this name."""
    family = next((known for known in ("a100", "h200", "h100") if known in name.lower()), "h100")
    cards = [card for card in CARDS.values() if card.name.startswith(family)]
    return min(cards, key=lambda card: abs(card.memory_gib - memory_gib))
