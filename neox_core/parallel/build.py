"""One rank's layers: built in its dimensions, with its weights on its device, then made parallel (parallelize.py)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from neox_core.model import FinalNorm, OutputHead, TokenEmbedding, TransformerBlock
from neox_core.parallel.layers import PipelineLayer
from neox_core.parallel.parallelize import Parallelism, parallelize

LayerWeights = Callable[[int, int], dict[str, Tensor]]
"""(NeoX layer index, tensor-parallel rank) -> the layer's state_dict for that rank."""


def layer_types(num_layers: int) -> list[type[nn.Module] | None]:
    """The class of each NeoX layer index; None where NeoX has a reshaping step and we have nothing."""
    return [TokenEmbedding, None, *[TransformerBlock] * num_layers, None, FinalNorm, OutputHead]


def build_layer(
    layer_type: type[nn.Module], index: int, place: Parallelism, weights: LayerWeights, dtype: torch.dtype
) -> PipelineLayer:
    """Build one layer of this rank on its device, with its weights.

    Args:
        index: NeoX layer index, which names the layer in checkpoints.

    Raises:
        RuntimeError: the weights have other names or shapes than the layer.
    """
    mesh = place.mesh
    with torch.device("meta"):
        layer = layer_type(place.dims.of_layer(index - 2).shard(mesh.tensor_size))
    loaded = weights(index, mesh.tensor_rank)
    own = {name: tensor.to(mesh.device, dtype, copy=True) for name, tensor in loaded.items()}
    layer.load_state_dict(own, strict=True, assign=True)
    if isinstance(layer, TransformerBlock):
        layer.attention.rotary.to(mesh.device)
    return parallelize(layer, place)
