"""Causal attention within documents that share a row of tokens: FlexAttention on CUDA, SDPA with a mask elsewhere."""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from neox_core.kernels.arithmetic import arithmetic_type

# The layers of a pipeline stage share a micro batch's mask; with a pipeline, several micro batches are under way.
_MASKS_KEPT = 8


def masked_attention(q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor, positions_BT: Tensor) -> Tensor:
    """Softmax(q k^T / sqrt(H)) v over earlier positions of the same document.

    Args:
        positions_BT: position of each token within its document, which starts where they start again from 0.
    """
    dtype = arithmetic_type(q_BTNH)
    q, k, v = (x.transpose(1, 2).to(dtype) for x in (q_BTNH, k_BTKH, v_BTKH))
    grouped = q.shape[1] != k.shape[1]
    if q.is_cuda:
        out = _flex_attention()(q, k, v, block_mask=_block_mask(positions_BT), enable_gqa=grouped)
    else:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=dense_mask(positions_BT), enable_gqa=grouped)
    return out.transpose(1, 2).to(q_BTNH.dtype)


@lru_cache(maxsize=_MASKS_KEPT)  # a tensor is hashed by its identity
def dense_mask(positions_BT: Tensor) -> Tensor:
    """True where a query may see a key: bool [B,1,T queries,T keys]."""
    index = torch.arange(positions_BT.shape[1], device=positions_BT.device)
    start_BT = index - positions_BT
    return ((index <= index[:, None]) & (index >= start_BT[..., None]))[:, None]


@lru_cache(maxsize=_MASKS_KEPT)
def _block_mask(positions_BT: Tensor) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    batch, tokens = positions_BT.shape
    start_BT = torch.arange(tokens, device=positions_BT.device) - positions_BT

    def visible(b: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (key >= start_BT[b, query])

    return create_block_mask(visible, batch, None, tokens, tokens, device=positions_BT.device)


@cache
def _flex_attention() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)
