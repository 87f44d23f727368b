"""One rank's layers, in a stated order.

Shard -> load weights -> tensor parallel -> joined residuals -> activation checkpointing -> positions beside the hidden
states.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from neox_core.model import FinalNorm, ModelDimensions, OutputHead, TokenEmbedding, TransformerBlock
from neox_core.model.residual import join_residuals
from neox_core.parallel.mesh import Mesh
from neox_core.parallel.replicas import mark_shared_rows
from neox_core.parallel.tensor_parallel import apply_tensor_parallel

LayerWeights = Callable[[int, int], dict[str, Tensor]]
"""(NeoX layer index, tensor-parallel rank) -> the layer's state_dict for that rank."""


def layer_types(num_layers: int) -> list[type[nn.Module] | None]:
    """The class of each NeoX layer index; None where NeoX has a reshaping step and we have nothing."""
    return [TokenEmbedding, None, *[TransformerBlock] * num_layers, None, FinalNorm, OutputHead]


def build_layer(
    layer_type: type[nn.Module],
    index: int,
    dims: ModelDimensions,
    mesh: Mesh,
    weights: LayerWeights,
    dtype: torch.dtype,
    recompute: bool,
    positions: bool = False,
) -> nn.Module:
    """Build one layer of this rank on its device, with its weights.

    Args:
        index: NeoX layer index, which names the layer in checkpoints.
        dims: the whole model's dimensions.
        recompute: recompute a transformer block's activations in the backward pass instead of keeping them.
        positions: the layer's argument and its result are (ids or hidden states, positions within documents).
    """
    with torch.device("meta"):
        layer = layer_type(dims.shard(mesh.tensor_size))
    layer = layer.to(dtype).to_empty(device=mesh.device)
    layer.load_state_dict(weights(index, mesh.tensor_rank), strict=True)
    apply_tensor_parallel(layer, mesh)
    if isinstance(layer, TransformerBlock):
        join_residuals(layer)
        if mesh.tensor_size > dims.num_kv_heads:
            mark_shared_rows(layer, dims.shard(mesh.tensor_size))
    if recompute and layer_type is TransformerBlock:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    if positions:
        _carry_positions(layer)
    return layer


def _carry_positions(layer: nn.Module) -> None:
    """Hand positions through to every block, as a pipeline passes one value from layer to layer; the norm ends it."""
    forward = layer.forward

    def embed(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return forward(pair[0]), pair[1]

    def block(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return forward(*pair), pair[1]

    def norm(pair: tuple[Tensor, Tensor]) -> Tensor:
        return forward(pair[0])

    adapted: dict[type[nn.Module], Callable[..., Any]] = {
        TokenEmbedding: embed,
        TransformerBlock: block,
        FinalNorm: norm,
        OutputHead: forward,
    }
    layer.forward = adapted[type(layer)]
