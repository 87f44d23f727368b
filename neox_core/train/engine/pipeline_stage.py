"""A stage of the pipeline: its layers with their weights, the loss, and what is recomputed."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.pipe import LayerSpec, PipelineModule
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import Tensor, nn

from neox_core.config import ActivationCheckpointing, BatchGeometry, RunConfig
from neox_core.kernels.attention import attention_function
from neox_core.model import ModelDimensions, TransformerBlock
from neox_core.parallel.build import LayerWeights, build_layer, layer_types
from neox_core.parallel.layers import ChunkedHead
from neox_core.parallel.loss import ChunkedLoss
from neox_core.parallel.parallelize import Parallelism
from neox_core.parallel.precision import parameter_dtype
from neox_core.parallel.ranks.mesh import Mesh
from neox_core.parallel.stages import pipeline_layers, stage_bounds
from neox_core.planning.activation_checkpointing import describe_modes, layer_modes
from neox_core.planning.memory import RESERVED_BYTES

logger = logging.getLogger(__name__)


class _LayerSpec(LayerSpec):  # type: ignore[misc]
    """A layer that DeepSpeed builds on the ranks of its stage only."""

    def __init__(self, layer_type: type[nn.Module], build: Callable[[], nn.Module]) -> None:
        super().__init__(layer_type)
        self._build = build

    def build(self, log: bool = False) -> nn.Module:
        return self._build()


def _pass_through(x: Any) -> Any:
    """Stands where NeoX transposes, so that layer numbers agree. Must not be a Module: it has no file."""
    return x


class _Pipeline(PipelineModule):  # type: ignore[misc]
    """DeepSpeed's pipeline with stages that begin at given layers, which are built in place in their dtype."""

    def __init__(self, bounds: list[int], **named: Any) -> None:
        self._bounds = bounds
        super().__init__(**named)

    def _partition_layers(self, method: str = "") -> None:
        self.parts = self._bounds
        stage = self._topo.get_coord(self.global_rank).pipe
        self._set_bounds(start=self.parts[stage], stop=self.parts[stage + 1])

    def _apply(self, fn: Any, recurse: bool = True) -> _Pipeline:
        # DeepSpeed moves and casts its module, which has been done; tensors without data could not be moved.
        return self


def build_stage(config: RunConfig, mesh: Mesh, geometry: BatchGeometry, weights: LayerWeights) -> PipelineModule:
    """Build the layers of this rank's stage. Collective over all ranks.

    Raises:
        ConfigError: the attention kernel cannot run here.
    """
    dims = ModelDimensions.of(config.model, config.train.sequence_length, config.train.attention)
    modes = _layer_modes(config, mesh, geometry)
    first_layer = sum(pipeline_layers(config)[: mesh.pipeline_rank])
    dtype = parameter_dtype(config)
    if config.train.mask_documents:
        logger.info("attention: FlexAttention, within documents")
    else:
        attention_function(dims.attention, mesh.device.type, dtype)  # refused now rather than in the first step

    loss = ChunkedLoss(config.train.loss_chunk_tokens, mesh.tensor_group, mesh.tensor_rank, config.train.z_loss)

    def build(index: int, layer_type: type[nn.Module]) -> nn.Module:
        mode = modes[index - 2 - first_layer] if layer_type is TransformerBlock else "none"
        layer = build_layer(layer_type, index, Parallelism(mesh, dims, mode), weights, dtype)
        if isinstance(layer, ChunkedHead):
            loss.project = layer.project
        return layer

    def spec(index: int, layer_type: type[nn.Module] | None) -> LayerSpec | Callable[[Tensor], Tensor]:
        return _pass_through if layer_type is None else _LayerSpec(layer_type, partial(build, index, layer_type))

    return _Pipeline(
        stage_bounds(config),
        layers=[spec(index, layer_type) for index, layer_type in enumerate(layer_types(config.model.num_layers))],
        topology=PipeModelDataParallelTopology(mesh.pipeline_size, mesh.tensor_size, mesh.data_size),
        loss_fn=loss,
    )


def _layer_modes(config: RunConfig, mesh: Mesh, geometry: BatchGeometry) -> tuple[ActivationCheckpointing, ...]:
    """Activation checkpointing of this stage's layers, the same on all of its ranks. Collective over all ranks."""
    available = config.train.memory_gib and config.train.memory_gib * 2**30
    if config.train.activation_checkpointing == "auto" and available is None and mesh.device.type == "cuda":
        # The rank with the least decides for its stage.
        free = torch.full((mesh.pipeline_size,), torch.inf, dtype=torch.float64, device=mesh.device)
        free[mesh.pipeline_rank] = torch.cuda.mem_get_info(mesh.device)[0] - RESERVED_BYTES
        dist.all_reduce(free, dist.ReduceOp.MIN)
        available = float(free[mesh.pipeline_rank])
    modes = layer_modes(config, geometry, mesh.pipeline_rank, available)
    if config.train.activation_checkpointing == "auto" and mesh.data_rank == mesh.tensor_rank == 0:
        logger.info("activation checkpointing on stage %d: %s", mesh.pipeline_rank, describe_modes(modes))
    return modes
