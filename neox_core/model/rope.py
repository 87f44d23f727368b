"""Rotary position embedding (arXiv 2104.09864), in the half-split form of NeoX and Hugging Face."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

_BETA_FAST, _BETA_SLOW = 32.0, 1.0
"""Turns within the original positions: the paper's, for Llama."""
_NARROWEST = 1e-3
"""Pairs between those that are kept and those that are lowered, at least."""


@dataclass(frozen=True)
class RopeScaling:
    """How a model that was extended to longer sequences lowers its frequencies; names are transformers'.

    linear: all by `factor` (arXiv 2306.15595). llama3: by `factor` where the wavelength exceeds
    original_max_position_embeddings / low_freq_factor, not at all where it is below
    original_max_position_embeddings / high_freq_factor, and in between by a linear blend (`apply_scaling` of Meta's
    llama-models, Llama 3.1). yarn: by `factor` for pairs of a head that turn less than beta_slow times within
    original_max_position_embeddings, not at all for those that turn more than beta_fast times, and in between by a
    linear blend over the pairs; queries and keys are also made longer by attention_factor (arXiv 2309.00071, whose
    code rounds the pairs outwards).
    """

    rope_type: Literal["linear", "llama3", "yarn"]
    factor: float
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    attention_factor: float | None = None

    @property
    def amplitude(self) -> float:
        """What cosines and sines are multiplied by; yarn's own is 0.1 ln(factor) + 1."""
        if self.rope_type != "yarn":
            return 1.0
        return self.attention_factor or (0.1 * math.log(max(1.0, self.factor)) + 1.0)

    def scaled(self, frequencies: Tensor, theta: float) -> Tensor:
        """The lowered frequencies, in radians per position, of theta^(-2i/head_dim)."""
        if self.rope_type == "linear":
            return frequencies / self.factor
        if self.rope_type == "yarn":
            return self._yarn(frequencies, theta)
        low, high, positions = self.low_freq_factor, self.high_freq_factor, self.original_max_position_embeddings
        assert low is not None
        assert high is not None
        assert positions is not None
        turns = positions * frequencies / (2 * math.pi)
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        return frequencies * (kept + (1 - kept) / self.factor)

    def _yarn(self, frequencies: Tensor, theta: float) -> Tensor:
        pairs, positions = len(frequencies), self.original_max_position_embeddings
        assert positions is not None

        def pair(turns: float) -> float:
            """The pair, as a fraction, that turns so often within the original positions."""
            return pairs * math.log(positions / (2 * math.pi * turns)) / math.log(theta)

        first = max(0, math.floor(pair(self.beta_fast or _BETA_FAST)))
        last = min(2 * pairs - 1, math.ceil(pair(self.beta_slow or _BETA_SLOW)))
        index = torch.arange(pairs, dtype=frequencies.dtype, device=frequencies.device)
        lowered = ((index - first) / max(last - first, _NARROWEST)).clamp(0, 1)
        return frequencies * (1 - lowered + lowered / self.factor)


NO_ROTATION = RopeScaling("linear", math.inf)
"""Every position counts as 0: cosines are 1 and sines 0, by which queries and keys keep every bit."""


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
    frequencies = theta**-exponents if scaling is None else scaling.scaled(theta**-exponents, theta)
    amplitude = 1.0 if scaling is None else scaling.amplitude
    angles = torch.outer(torch.arange(positions, dtype=torch.float64, device="cpu"), frequencies)
    return (amplitude * angles.cos()).float(), (amplitude * angles.sin()).float()


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
