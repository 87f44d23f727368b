"""Rotary positions are exact where bf16 and fp32 angles are not."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from neox_core.model import elementwise
from neox_core.model.rope import NO_ROTATION, RopeScaling, RotaryEmbedding, rope_tables
from tests.neox_core.model.reference import rotate

HEAD_DIM, POSITIONS = 128, 16_384


def exact(position: int, theta: float) -> tuple[list[float], list[float]]:
    """Cosines and sines of one position, number by number in Python's floats."""
    angles = [position / theta ** (2 * i / HEAD_DIM) for i in range(HEAD_DIM // 2)]
    return [math.cos(angle) for angle in angles], [math.sin(angle) for angle in angles]


def angle_error(cos: Tensor, sin: Tensor, position: int, theta: float) -> float:
    """Largest error of a position's table entries."""
    expected = torch.tensor(exact(position, theta), dtype=torch.float64)
    return float((torch.stack((cos[position], sin[position])).double() - expected).abs().max())


@pytest.mark.parametrize("theta", [1e4, 1e6])
def test_tables_are_exact_to_the_last_position(theta: float) -> None:
    cos, sin = rope_tables(HEAD_DIM, POSITIONS, theta)
    assert cos.shape == sin.shape == (POSITIONS, HEAD_DIM // 2)
    assert cos.dtype == sin.dtype == torch.float32
    for position in (0, 1, 255, 257, 4095, 10_007, POSITIONS - 1):
        assert angle_error(cos, sin, position, theta) <= 1e-7


def test_lower_precision_would_have_been_wrong() -> None:
    """Size of the faults that we do not have: the seed's angles in bf16, and the usual ones in fp32."""

    def naive(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        frequencies = 1.0 / (1e6 ** (torch.arange(0, HEAD_DIM, 2, dtype=torch.float32) / HEAD_DIM))
        angles = torch.outer(torch.arange(POSITIONS).to(dtype), frequencies.to(dtype))
        return angles.cos(), angles.sin()

    last = POSITIONS - 1
    assert angle_error(*naive(torch.bfloat16), last, 1e6) > 1.0
    assert angle_error(*naive(torch.bfloat16), 257, 1e6) > 0.5
    assert 1e-4 < angle_error(*naive(torch.float32), last, 1e6) < 2e-3
    assert angle_error(*rope_tables(HEAD_DIM, POSITIONS, 1e6), last, 1e6) <= 1e-7


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.bfloat16(),
        lambda model: model.half(),
        lambda model: model.to(torch.bfloat16),
        lambda model: model.to_empty(device="cpu"),
    ],
    ids=["bfloat16", "half", "to", "to_empty"],
)
def test_tables_survive_what_is_done_to_models(change: Callable[[nn.Module], nn.Module]) -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(2, 2), RotaryEmbedding(HEAD_DIM, 300, 1e6))
    rotary = change(model.to_empty(device="cpu"))[1]  # type: ignore[index]
    cos, sin = rope_tables(HEAD_DIM, 300, 1e6)
    assert rotary.cos.dtype == rotary.sin.dtype == torch.float32
    assert torch.equal(rotary.cos, cos)
    assert torch.equal(rotary.sin, sin)
    assert model.state_dict().keys() == {"0.weight", "0.bias"}


def test_rotation_in_fp32() -> None:
    x = torch.randn(2, 4096, 3, HEAD_DIM, generator=torch.Generator().manual_seed(1))
    rotated = elementwise.rotate(x, *RotaryEmbedding(HEAD_DIM, POSITIONS, 1e6)(4096))
    assert rotated.dtype == torch.float32
    assert float((rotated.double() - rotate(x, 1e6)).abs().max()) <= 1e-6


def test_rotation_of_bf16_is_rounded_once() -> None:
    x = torch.randn(1, 512, 2, HEAD_DIM, generator=torch.Generator().manual_seed(2)).bfloat16()
    rotated = elementwise.rotate(x, *RotaryEmbedding(HEAD_DIM, 512, 1e6)(512))
    expected = rotate(x, 1e6)
    assert rotated.dtype == torch.bfloat16
    # bf16 has 8 significant bits: rounding to nearest is off by at most 2^-8 of the number.
    assert bool(((rotated.double() - expected).abs() <= expected.abs() * 2**-8 + 1e-6).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_rotation_keeps_every_bit(dtype: torch.dtype) -> None:
    x = torch.randn(2, 512, 3, HEAD_DIM, generator=torch.Generator().manual_seed(4)).to(dtype)
    assert torch.equal(elementwise.rotate(x, *RotaryEmbedding(HEAD_DIM, 512, 1e6, NO_ROTATION)(512)), x)


def test_scores_depend_on_the_distance_alone() -> None:
    generator = torch.Generator().manual_seed(3)
    q, k = (torch.randn(1, 1, 1, HEAD_DIM, generator=generator) for _ in range(2))
    rotary = RotaryEmbedding(HEAD_DIM, POSITIONS, 1e6)
    q_everywhere, k_everywhere = (
        elementwise.rotate(x.expand(1, POSITIONS, 1, HEAD_DIM), *rotary(POSITIONS)).double().squeeze() for x in (q, k)
    )
    near = q_everywhere[37] @ k_everywhere[0]
    far = q_everywhere[16_383] @ k_everywhere[16_346]
    assert abs(float(near - far)) < 1e-5 * HEAD_DIM**0.5


LLAMA3: dict[str, Any] = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@pytest.mark.parametrize(
    "scaling",
    [
        RopeScaling("linear", 4.0),
        RopeScaling("llama3", 8.0, **LLAMA3),
        RopeScaling("llama3", 32.0, 1.0, 2.0, 4096),
        RopeScaling("yarn", 4.0, original_max_position_embeddings=4096),
        RopeScaling("yarn", 16.0, None, None, 2048, 24.0, 2.0, 1.25),
    ],
    ids=["linear", "Llama 3.1", "other numbers", "yarn", "yarn with other numbers"],
)
def test_scaled_frequencies_are_those_of_transformers(scaling: RopeScaling) -> None:
    parameters = {name: value for name, value in vars(scaling).items() if value is not None} | {"rope_theta": 5e5}
    config = LlamaConfig(head_dim=HEAD_DIM, rope_parameters=parameters)
    expected, attention_factor = ROPE_INIT_FUNCTIONS[scaling.rope_type](config, "cpu")
    assert scaling.amplitude == pytest.approx(attention_factor)
    frequencies = 5e5 ** -(torch.arange(0, HEAD_DIM, 2, dtype=torch.float64) / HEAD_DIM)
    found = scaling.scaled(frequencies, 5e5)
    torch.testing.assert_close(found, expected.double(), rtol=1e-6, atol=0)
    assert not torch.allclose(found, frequencies, rtol=1e-2)
    # Tables at a late position, from angles in float64.
    cos, sin = rope_tables(HEAD_DIM, POSITIONS, 5e5, scaling)
    angles = (POSITIONS - 1) * found
    for table, expected in ((cos, angles.cos()), (sin, angles.sin())):
        assert float((table[-1].double() - scaling.amplitude * expected).abs().max()) <= 1e-7
