"""Builds the engine: a rank's stage of the pipeline, the optimizer, and DeepSpeed around them."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.config import DeepSpeedConfig
from torch import nn

from neox_core.config import BatchGeometry, OptimizerConfig, RunConfig
from neox_core.optimizer import UpdateRule, update_rule
from neox_core.parallel.build import LayerWeights
from neox_core.parallel.ranks.mesh import Mesh, neighbours_group
from neox_core.parallel.sharding import sharding_of
from neox_core.parallel.stages import defers
from neox_core.parallel.weight_gradients import DeferredGradients, accumulate_gradients
from neox_core.train.engine.gradient_norms import GradientNorms
from neox_core.train.engine.pipeline_stage import build_stage
from neox_core.train.engine.setup import attach_deepspeed, deepspeed_config
from neox_core.train.engine.state.verification import verify_loaded
from neox_core.train.engine.tied_head import tie_head
from neox_core.train.engine.training_engine import TrainingEngine


def build_engine(
    config: RunConfig, mesh: Mesh, geometry: BatchGeometry, weights: LayerWeights, rule: UpdateRule | None = None
) -> TrainingEngine:
    """Build this rank's stage with its weights, and the engine around it. Collective over all ranks.

    Args:
        rule: updates the weights; None: the configuration's.

    Raises:
        CheckpointError: the fp32 master weights are not the weights that were loaded.
        ConfigError: attention or optimizer cannot be had here.
    """
    attach_deepspeed()
    settings = deepspeed_config(config, geometry)
    module = build_stage(config, mesh, geometry, weights)
    engine = TrainingEngine(
        rule=rule or update_rule(config.train.optimizer),
        mesh=mesh,
        kv_group=_kv_group(config),
        packed=config.train.master_weights == "packed" and config.train.precision == "bf16",
        deferred=DeferredGradients() if defers(config, mesh.pipeline_rank) else None,
        args=device_arguments(mesh.device),
        model=module,
        optimizer=ParameterGroups(module, config.train.optimizer),
        mpu=module.mpu(),
        dist_init_required=False,
        config=settings,
        config_class=DeepSpeedConfig(settings, module.mpu()),
    )
    if config.model.tied_embeddings:
        engine.optimizer.tied_head = tie_head(module, engine.optimizer, mesh)
    verify_loaded(engine)
    norms = GradientNorms(module, engine.optimizer, config.model, mesh)
    engine.gradient_groups, engine.optimizer.group_squares = norms.names, norms.squares
    some_defer = defers(config, mesh.pipeline_size - 1)
    if some_defer or (mesh.device.type == "cuda" and config.train.precision == "bf16"):
        accumulate_in_products(engine, geometry)
    engine.await_parameters()
    if config.train.cuda_graphs == "auto":
        engine.record_graphs()
    return engine


def accumulate_in_products(engine: TrainingEngine, geometry: BatchGeometry) -> None:
    """Let products and blocks' norms add gradients to the optimizer's buffers, the head's product with the loss."""
    accumulate_gradients(engine.module, engine.optimizer, engine.deferred)
    engine.module.loss_fn.early_gradient = 1 / geometry.accumulation_steps


class ParameterGroups(torch.optim.Optimizer):
    """Groups of parameters and their optimizer's state in torch's form, which DeepSpeed wants. It updates nothing.

    With weight decay, and without. Every pipeline stage has both groups, or DeepSpeed's reductions deadlock.

    Raises:
        ConfigError: a parameter that nothing says how ranks hold.
    """

    def __init__(self, module: nn.Module, config: OptimizerConfig) -> None:
        marked = [(parameter, sharding_of(parameter, name)) for name, parameter in module.named_parameters()]
        decays = [(parameter, sharding.decays) for parameter, sharding in marked if not sharding.tied]
        groups: list[dict[str, Any]] = [
            {"params": [p for p, decayed in decays if decayed], "weight_decay": config.weight_decay},
            {"params": [p for p, decayed in decays if not decayed], "weight_decay": 0.0},
        ]
        super().__init__(groups, {"lr": config.lr})


def device_arguments(device: torch.device) -> Namespace | None:
    """DeepSpeed takes the GPU whose number is LOCAL_RANK, where a rank may see no other than its own, number 0."""
    return Namespace(device_rank=device.index) if device.type == "cuda" else None


def _kv_group(config: RunConfig) -> dist.ProcessGroup | None:
    """The ranks that share this rank's KV head, if any do. Collective over all ranks."""
    copies = config.parallel.tensor // config.model.num_kv_heads
    return neighbours_group(copies) if copies > 1 else None
