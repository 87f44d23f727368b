"""Rotary position embedding (arXiv 2104.09864), in the half-split form of NeoX and Hugging Face."""

from __future__ import annotations

import torch
from torch import Tensor


def rope_tables(head_dim: int, positions: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the angles `position / theta^(2i/head_dim)`.

    The angles are computed in float64: bf16 cannot represent positions past 256, and fp32 angles at position
    16,383 are off by up to 1e-3.

    Returns:
        Two fp32 tensors [positions, head_dim / 2].
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    angles = torch.outer(torch.arange(positions, dtype=torch.float64), theta**-exponents)
    return angles.cos().float(), angles.sin().float()


def rotate(x_BTNH: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the two halves of each head by its position's angles, in fp32; the result has the input's dtype."""
    tokens = x_BTNH.shape[1]
    cos, sin = cos[:tokens, None], sin[:tokens, None]
    first, second = x_BTNH.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x_BTNH.dtype)
