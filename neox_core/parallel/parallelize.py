"""How a layer of the model becomes what a rank runs: all steps, in their order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from neox_core.config import ActivationCheckpointing
from neox_core.model import FinalNorm, ModelDimensions, OutputHead, TokenEmbedding, TransformerBlock
from neox_core.parallel import sharding, weight_gradients
from neox_core.parallel.activation_checkpointing import checkpointing_of
from neox_core.parallel.layers import ChunkedHead, FusedBlock, LastNorm, PipelineLayer, SplitEmbedding
from neox_core.parallel.ranks.mesh import Mesh
from neox_core.parallel.tensor_parallel import SplitRegion


@dataclass(frozen=True)
class Parallelism:
    """What the steps need to know of a layer's place."""

    mesh: Mesh
    dims: ModelDimensions
    """The whole model's."""
    activation_checkpointing: ActivationCheckpointing = "none"
    """Of a transformer block."""


def mark_parameters(layer: nn.Module, place: Parallelism) -> nn.Module:
    """Each parameter says how the ranks hold it. First, since a layer is known by the model's class and names."""
    mesh = place.mesh
    sharding.mark_parameters(layer, place.dims, mesh.tensor_size, mesh.sequence_parallel)
    return layer


def accept_accumulators(layer: nn.Module, place: Parallelism) -> nn.Module:
    """Linear layers get a place for the optimizer's buffer, which is set when there is an optimizer."""
    weight_gradients.accept_accumulators(layer)
    return layer


def fuse(layer: nn.Module, place: Parallelism) -> PipelineLayer:
    """The layer becomes the class that a pipeline calls; a block's additions join its norms, which get a place for the
    optimizer's buffer."""
    if isinstance(layer, TokenEmbedding):
        return SplitEmbedding(layer)
    if isinstance(layer, TransformerBlock):
        return FusedBlock(layer)
    if isinstance(layer, FinalNorm):
        return LastNorm(layer)
    assert isinstance(layer, OutputHead), f"no class runs a {type(layer).__name__}"
    return ChunkedHead(layer)


def split_among_ranks(layer: nn.Module, place: Parallelism) -> nn.Module:
    """Hidden states are exchanged where the layer's class enters and leaves a region that tensor parallelism splits."""
    assert isinstance(layer, PipelineLayer)
    layer.region = SplitRegion.of(place.mesh)
    if isinstance(layer, FusedBlock) and layer.region is not None:
        layer.attention.of_all_heads = layer.region.mean
    return layer


def checkpoint_activations(layer: nn.Module, place: Parallelism) -> nn.Module:
    """Last, since it decides what is kept of all that the block does by now, exchanges included."""
    assert isinstance(layer, PipelineLayer)
    if isinstance(layer, FusedBlock):
        layer.checkpointing = checkpointing_of(place.activation_checkpointing)
    return layer


STEPS: tuple[Callable[[nn.Module, Parallelism], nn.Module], ...] = (
    mark_parameters,
    accept_accumulators,
    fuse,
    split_among_ranks,
    checkpoint_activations,
)
"""In this order."""


def parallelize(layer: nn.Module, place: Parallelism) -> PipelineLayer:
    """Turn one of the model's layers, with a rank's dimensions and weights, into what the rank runs.

    Afterwards nothing replaces a forward: the optimizer's buffers go where AccumulatingLinear and AccumulatingNorm
    have a place for them.

    Raises:
        ConfigError: a parameter that nothing says how ranks hold.
    """
    for step in STEPS:
        layer = step(layer, place)
    assert isinstance(layer, PipelineLayer)
    return layer
