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

from neox_core.model import FinalNorm, ModelDimensions, OutputHead, TokenEmbedding, TransformerBlock
from neox_core.model.residual import join_residuals
from neox_core.parallel.activation_checkpointing import Recompute, apply_recompute
from neox_core.parallel.mesh import Mesh
from neox_core.parallel.replicas import mark_shared_rows
from neox_core.parallel.tensor_parallel import apply_tensor_parallel, gathered

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
    recompute: Recompute,
    positions: bool = False,
) -> nn.Module:
    """Build one layer of this rank on its device, with its weights.

    Args:
        index: NeoX layer index, which names the layer in checkpoints.
        dims: the whole model's dimensions.
        recompute: what a transformer block computes again in the backward pass instead of keeping it.
        positions: the layer's argument and its result are (ids or hidden states, positions within documents).
    """
    with torch.device("meta"):
        layer = layer_type(dims.shard(mesh.tensor_size))
    loaded = weights(index, mesh.tensor_rank)
    own = {name: tensor.to(mesh.device, dtype, copy=True) for name, tensor in loaded.items()}
    layer.load_state_dict(own, strict=True, assign=True)
    if isinstance(layer, TransformerBlock):
        layer.attention.rotary.to(mesh.device)
    apply_tensor_parallel(layer, mesh)
    if isinstance(layer, TransformerBlock):
        join_residuals(layer)
        if mesh.tensor_size > dims.num_kv_heads:
            mark_shared_rows(layer, dims.shard(mesh.tensor_size))
        gather = partial(gathered, group=mesh.tensor_group) if mesh.sequence_parallel else None
        apply_recompute(layer, recompute, gather)
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
