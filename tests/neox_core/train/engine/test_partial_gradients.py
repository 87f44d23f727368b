"""Replicated parameters of which each tensor-parallel rank has a part of the gradient: two ranks train as one does."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neox_core.config import LaunchConfig, OptimizerConfig, ParallelConfig
from neox_core.errors import ConfigError
from neox_core.parallel.sharding import HEAD_NORM, ROWS, TOKEN_NORM, set_sharding
from neox_core.parallel.tensor_parallel import SplitRegion
from tests.distributed import run_ranks

HEADS, HEAD_DIM, HIDDEN = 4, 6, 8
RULE = OptimizerConfig(lr=1e-2)


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class NormedHeads(nn.Module):
    """Heads that ranks split, each normalized with the same scale: a sum of all of them is the same on each rank."""

    def __init__(self, region: SplitRegion | None) -> None:
        super().__init__()
        self.region = region
        weight = random(HEADS * HEAD_DIM, HIDDEN, seed=1)
        self.weight = nn.Parameter(weight if region is None else weight.chunk(2)[region.rank].clone())
        self.before = nn.Parameter(1 + random(HIDDEN, seed=2) / 4)
        self.head_norm = nn.Parameter(1 + random(HEAD_DIM, seed=3) / 4)

    def mark(self) -> None:
        """Say how the ranks hold the parameters."""
        set_sharding(self.weight, ROWS)
        set_sharding(self.before, TOKEN_NORM)
        set_sharding(self.head_norm, HEAD_NORM)

    def forward(self, x: Tensor) -> Tensor:
        """[B,T,D] -> [B,T,H]"""
        x = F.rms_norm(x, (HIDDEN,)) * self.before
        x = x if self.region is None else self.region.enter(x)
        heads = F.linear(x, self.weight).unflatten(-1, (-1, HEAD_DIM))
        partial = (F.rms_norm(heads, (HEAD_DIM,)) * self.head_norm).square().sum(-2)
        return partial if self.region is None else self.region.leave(partial)


def make_optimizer(module: nn.Module, mesh: Any) -> Any:
    """The optimizer of a training, without an engine around it."""
    import torch.distributed as dist
    from deepspeed.runtime.pipe.topology import PipelineParallelGrid, PipeModelDataParallelTopology
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config
    from deepspeed.utils.timer import NoopTimer

    from neox_core.optimizer import update_rule
    from neox_core.train.engine.deepspeed_engine import ParameterGroups
    from neox_core.train.engine.sharded_optimizer import ShardedOptimizer

    topology = PipeModelDataParallelTopology(1, mesh.tensor_size, 1)
    grid = PipelineParallelGrid(topology=topology, process_group=dist.new_group())
    return ShardedOptimizer(
        ParameterGroups(module, RULE),
        {parameter: f"0.{name}" for name, parameter in module.named_parameters()},
        rule=update_rule(RULE),
        mesh=mesh,
        kv_group=None,
        packed=False,
        bfloat16_config=DeepSpeedBF16Config(enabled=True, immediate_grad_update=True),
        mpu=grid,
        clip_grad=1.0,
        dp_process_group=grid.get_data_parallel_group(),
        timers=NoopTimer(),
        grad_acc_dtype=torch.float32,
    )


def train() -> dict[str, Any]:
    """One rank: gradients of the first step, gradient norms of three, and the parameters after them and after a fourth,
    in which the last rank has a NaN."""
    import torch.distributed as dist

    from neox_core.parallel.ranks.mesh import build_mesh, init_distributed
    from neox_core.train.engine.gradient_norms import GradientNorms
    from neox_core.train.engine.setup import attach_deepspeed

    device = init_distributed(LaunchConfig(device="cpu"))
    attach_deepspeed()
    mesh = build_mesh(ParallelConfig(tensor=dist.get_world_size(), sequence=False), device)
    module = NormedHeads(SplitRegion.of(mesh))
    with pytest.raises(ConfigError, match="parameter weight of shape"):
        make_optimizer(module, mesh)
    module.mark()
    optimizer = make_optimizer(module, mesh)
    model: Any = SimpleNamespace(num_layers=1, num_kv_heads=HEADS)
    optimizer.group_squares = GradientNorms(nn.Sequential(module), optimizer, model, mesh).squares
    places = zip(optimizer.bf16_groups, optimizer.fp32_groups_gradients, strict=True)
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    pairs = [pair for group, buffers in places for pair in zip(group, buffers, strict=True)]
    buffers = {names[id(p)]: buffer.view(p.shape) for p, buffer in pairs}
    gradients: dict[str, Tensor] = {}
    norms = []
    for step in range(3):
        module(random(2, 5, HIDDEN, seed=10 + step)).mul(random(2, 5, HEAD_DIM, seed=20 + step)).mean().backward()
        optimizer.reduce_gradients()
        if step == 0:
            gradients = {name: buffer.detach().clone() for name, buffer in buffers.items()}
        optimizer.counted_share = torch.tensor(float(mesh.tensor_rank == 0), dtype=torch.float64)
        optimizer.step()
        norms.append(float(optimizer._global_grad_norm))
        optimizer.zero_grad()
    assert not optimizer.differs_from_peers()
    if mesh.tensor_rank == mesh.tensor_size - 1:  # of what the first rank has as well
        buffers["before"][0] = math.nan
    optimizer.step()
    assert math.isnan(float(optimizer._global_grad_norm))
    parameters = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    return {"gradients": gradients, "norms": norms, "parameters": parameters}


def test_two_ranks_train_as_one() -> None:
    (expected,), ranks = run_ranks(train, 1), run_ranks(train, 2)
    for kind in ("gradients", "parameters"):
        first, second = (rank[kind] for rank in ranks)
        for name in ("before", "head_norm"):
            assert torch.equal(first[name], second[name]), f"{kind} of {name}"
            torch.testing.assert_close(first[name], expected[kind][name], rtol=1e-5, atol=1e-6)
        whole = torch.cat([first["weight"], second["weight"]])
        torch.testing.assert_close(whole, expected[kind]["weight"], rtol=1e-5, atol=1e-6)
    for rank in ranks:
        torch.testing.assert_close(torch.tensor(rank["norms"]), torch.tensor(expected["norms"]), rtol=1e-5, atol=0)
