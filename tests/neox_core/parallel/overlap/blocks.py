"""A transformer block on one rank of several, with whatever exchanges its tokens."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from neox_core.config import ActivationCheckpointing
from neox_core.model import ModelDimensions, TransformerBlock
from neox_core.parallel.activation_checkpointing import checkpointing_of
from neox_core.parallel.layers import FusedBlock
from neox_core.parallel.overlap.exchange import Exchange
from neox_core.parallel.tensor_parallel import SplitRegion
from neox_core.parallel.weight_gradients import AccumulatingLinear, Accumulator, accept_accumulators


def run_block(
    dims: ModelDimensions, mode: ActivationCheckpointing, exchange: Exchange | None, device: str, dtype: torch.dtype
) -> dict[str, Any]:
    """Output and gradients of a random block of the world's ranks, the same at each call."""
    group, rank, size = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    assert group is not None
    torch.manual_seed(rank)
    with torch.device(device):
        plain = TransformerBlock(dims.shard(size)).to(dtype)
        x = torch.randn(2, dims.sequence_length // size, dims.hidden_size, dtype=dtype).requires_grad_()
        gradient = torch.randn_like(x)
    plain.attention.rotary.to(device)
    accept_accumulators(plain)
    called: list[str] = []
    buffers: dict[str, Tensor] = {}
    for name, linear in plain.named_modules():
        if isinstance(linear, AccumulatingLinear):
            buffers[name] = torch.zeros_like(linear.weight, dtype=torch.float32)
            linear.accumulator = Accumulator(buffers[name], partial(called.append, name))
    block = FusedBlock(plain)
    block.checkpointing = checkpointing_of(mode)
    block.region = SplitRegion(group, rank, tokens_split=True, exchange=exchange)
    y = block.compute(x, None)
    y.backward(gradient)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        evaluated = block.compute(x, None)
    found = {f"{name} weight": buffer for name, buffer in buffers.items()}
    found |= {name: p.grad for name, p in block.named_parameters() if p.grad is not None}
    tensors = {"output": y.detach(), "evaluated": evaluated, "input": x.grad, **found}
    return {**{name: tensor.cpu() for name, tensor in tensors.items() if tensor is not None}, "called": sorted(called)}
