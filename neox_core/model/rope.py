"""Rotary position embedding (arXiv 2104.09864), in the half-split form of NeoX and Hugging Face."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class RopeScaling:
    """How a model that was extended to longer sequences lowers its frequencies; names are transformers'.

    linear: all by `factor` (arXiv 2306.15595). llama3: by `factor` where the wavelength exceeds
    original_max_position_embeddings / low_freq_factor, not at all where it is below
    original_max_position_embeddings / high_freq_factor, and in between by a linear blend (`apply_scaling` of Meta's
    llama-models, Llama 3.1).
    """

    rope_type: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None

    def scaled(self, frequencies: Tensor) -> Tensor:
        """The lowered frequencies, in radians per position."""
        if self.rope_type == "linear":
            return frequencies / self.factor
        low, high, positions = self.low_freq_factor, self.high_freq_factor, self.original_max_position_embeddings
        assert low is not None
        assert high is not None
        assert positions is not None
        turns = positions * frequencies / (2 * math.pi)
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        return frequencies * (kept + (1 - kept) / self.factor)


def rope_tables(
    head_dim: int, positions: int, theta: float, scaling: RopeScaling | None = None
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the angles `position / theta^(2i/head_dim)`, their frequencies scaled where asked for.

    The angles are computed in float64: bf16 cannot represent positions past 256, and fp32 angles at position
    16,383 are off by up to 1e-3.

    Returns:
        Two fp32 tensors [positions, head_dim / 2].
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64, device="cpu") / head_dim
    frequencies = theta**-exponents if scaling is None else scaling.scaled(theta**-exponents)
    angles = torch.outer(torch.arange(positions, dtype=torch.float64, device="cpu"), frequencies)
    return angles.cos().float(), angles.sin().float()


class RotaryEmbedding(nn.Module):
    """The tables by which queries and keys are rotated. They stay in fp32, whatever the model's dtype."""

    cos: Tensor
    sin: Tensor

    def __init__(self, head_dim: int, positions: int, theta: float, scaling: RopeScaling | None = None) -> None:
        super().__init__()
        cos, sin = rope_tables(head_dim, positions, theta, scaling)
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
