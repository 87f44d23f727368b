"""One rank of a training, without data: the real layers, the real engine and optimizer, on tensors without memory."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from neox_core.config import RunConfig, largest_batch
from neox_core.optimizer import MasterWeights, UpdateStep, update_rule
from neox_core.parallel.ranks.mesh import Axis, Mesh, build_mesh
from neox_core.planning.communication import Collective
from neox_core.simulate.recorder import Recorder


@dataclass(frozen=True)
class RankSimulation:
    """What one rank needed; sizes in bytes."""

    stage: int
    """Its pipeline stage."""
    state: int
    """Alive between steps: weights, gradients, optimizer."""
    start_peak: int
    """Most while the engine was built."""
    step_peak: int
    """Most during a step."""
    collective_bytes: dict[Collective, int]
    """Of one step, by group and kind: the whole tensor's size, which is a reduction's input or a gathering's output."""
    collective_calls: dict[Collective, int]


def simulate_rank(config: RunConfig, nodes: int | None, rank: int) -> RankSimulation:
    """Build a rank's part of the training and run one step. Needs a process of its own.

    What is not real: tensors have no data, kernels of the GPU are replaced by stand-ins with the same needs, and a
    pipeline stage knows the shapes that its neighbours would tell it.
    """
    os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": "0"}  # read when the engine is imported
    import torch.distributed._tools.fake_collectives  # tells tensors without data what collectives return
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.testing._internal.distributed.fake_pg import FakeStore

    geometry = largest_batch(config, nodes)
    dist.init_process_group("fake", rank=rank, world_size=geometry.world_size, store=FakeStore())

    from neox_core.simulate.kernels import gpu_kernels
    from neox_core.train.engine.deepspeed_engine import accumulate_in_products, build_engine
    from neox_core.train.engine.simulated import state_shapes

    mesh = build_mesh(config.parallel, torch.device("cpu"))
    recorder = Recorder(_group_names(mesh))
    with FakeTensorMode(allow_non_fake_inputs=True), recorder, gpu_kernels(recorder):
        rule = _StateOnly(update_rule(config.train.optimizer).state_names)
        engine = build_engine(config, mesh, geometry, _weights(config), rule)
        if config.train.precision == "bf16":
            accumulate_in_products(engine, geometry)
        state_shapes(engine, config)
        state, start_peak = recorder.bytes, recorder.peak_bytes
        recorder.restart()
        engine.train_batch(_batches(config))
    return RankSimulation(
        stage=mesh.pipeline_rank,
        state=state,
        start_peak=start_peak,
        step_peak=recorder.peak_bytes,
        collective_bytes=dict(recorder.collective_bytes),
        collective_calls=dict(recorder.collective_calls),
    )


@dataclass(frozen=True)
class _StateOnly:
    """Stands for an update rule: one kernel, which allocates nothing."""

    state_names: tuple[str, ...]

    def update(
        self, weights: MasterWeights, gradient: Tensor, state: Mapping[str, Tensor], scale: Tensor, step: UpdateStep
    ) -> None:
        """Nothing."""


def _group_names(mesh: Mesh) -> dict[tuple[int, ...], str]:
    axes: tuple[Axis, ...] = ("tensor", "data", "pipeline")
    return {tuple(range(mesh.world_size)): "all", **{tuple(mesh.peers(axis)): axis for axis in axes}}


def _weights(config: RunConfig) -> Any:
    from neox_core.model import ModelDimensions
    from neox_core.parallel.build import layer_types

    types = layer_types(config.model.num_layers)
    dims = ModelDimensions.of(config.model, 1).shard(config.parallel.tensor)

    def weights(index: int, tensor_rank: int) -> dict[str, Tensor]:
        layer_type = types[index]
        assert layer_type is not None
        with torch.device("meta"):
            shapes = layer_type(dims).state_dict()
        return {name: torch.empty(tensor.shape, dtype=torch.bfloat16) for name, tensor in shapes.items()}

    return weights


def _batches(config: RunConfig) -> Iterator[Any]:
    shape = (config.train.micro_batch_size, config.train.sequence_length)
    while True:
        ids = torch.zeros(shape, dtype=torch.long)
        yield ((ids, torch.zeros_like(ids)) if config.train.mask_documents else ids), ids
