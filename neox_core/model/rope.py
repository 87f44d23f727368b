"""Rotary position embedding (arXiv 2104.09864), in the half-split form of NeoX and Hugging Face."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def rope_tables(head_dim: int, positions: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the angles `position / theta^(2i/head_dim)`.

    The angles are computed in float64: bf16 cannot represent positions past 256, and fp32 angles at position
    16,383 are off by up to 1e-3.

    Returns:
        Two fp32 tensors [positions, head_dim / 2].
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64, device="cpu") / head_dim
    angles = torch.outer(torch.arange(positions, dtype=torch.float64, device="cpu"), theta**-exponents)
    return angles.cos().float(), angles.sin().float()


class RotaryEmbedding(nn.Module):
    """The tables by which queries and keys are rotated. They stay in fp32, whatever the model's dtype."""

    cos: Tensor
    sin: Tensor

    def __init__(self, head_dim: int, positions: int, theta: float) -> None:
        super().__init__()
        cos, sin = rope_tables(head_dim, positions, theta)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, tokens: int, positions_BT: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Cosines and sines, fp32 [..., T, head_dim / 2]; positions are 0 ... tokens-1 where none are given"""
        rows = slice(tokens) if positions_BT is None else positions_BT
        return self.cos[rows], self.sin[rows]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RotaryEmbedding:
        # `model.bfloat16()`, which DeepSpeed calls, would round the tables: follow moves to a device only.
        device = fn(self.cos).device
        self.cos, self.sin = self.cos.to(device), self.sin.to(device)
        return self
