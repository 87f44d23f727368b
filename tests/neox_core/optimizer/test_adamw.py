"""The fused update against torch's AdamW in float64, and packed master weights against full ones."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from neox_core.optimizer.adamw import AdamW
from neox_core.optimizer.master_weights import MasterWeights, pack, unpack
from neox_core.optimizer.rule import UpdateStep

SIZE = 5000
STEPS = 20
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def gradients(device: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(SIZE, generator=generator).to(device) * 10.0 ** (i % 5 - 3) for i in range(STEPS)]


def numbers(device: str) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(SIZE, generator=generator).to(device).bfloat16()


def update(
    weights: MasterWeights, gradient: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, scale: float, number: int
) -> None:
    device = gradient.device
    step = UpdateStep(lr=1e-2, weight_decay=0.1, number=torch.tensor(float(number), device=device))
    state = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    AdamW(0.9, 0.95, 1e-8).update(weights, gradient, state, torch.tensor(scale, device=device), step)


def run(
    device: str, packed: bool, dtype: torch.dtype = torch.bfloat16, scale: float = 0.5
) -> tuple[MasterWeights, Tensor, Tensor]:
    """Master weights and moments after 20 updates."""
    weights = MasterWeights(numbers(device).to(dtype), packed)
    exp_avg, exp_avg_sq = torch.zeros(SIZE, device=device), torch.zeros(SIZE, device=device)
    for number, gradient in enumerate(gradients(device), start=1):
        update(weights, gradient, exp_avg, exp_avg_sq, scale, number)
        assert not gradient.any(), "the gradient is cleared"
    return weights, exp_avg, exp_avg_sq


def require(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("packed", "dtype"), [(False, torch.bfloat16), (True, torch.bfloat16), (False, torch.float32)])
def test_equals_torch_in_float64(device: str, packed: bool, dtype: torch.dtype) -> None:
    require(device)
    exact = torch.nn.Parameter(numbers("cpu").double())
    optimizer = torch.optim.AdamW([exact], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for gradient in gradients("cpu"):
        exact.grad = gradient.double() * 0.5
        optimizer.step()
    weights, exp_avg, exp_avg_sq = run(device, packed, dtype)
    state = optimizer.state[exact]
    torch.testing.assert_close(weights.to_host().double(), exact.detach(), rtol=1e-5, atol=1e-6)
    if dtype == torch.float32:
        assert weights.storage.data_ptr() == weights.low_precision.data_ptr(), "no second copy"
    # The largest gradients are about 20: fp32 resolves their mean to 1e-6 where terms cancel.
    torch.testing.assert_close(exp_avg.cpu().double(), state["exp_avg"], rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(exp_avg_sq.cpu().double(), state["exp_avg_sq"], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("scale", [0.0, math.nan, -1.0])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("packed", [False, True])
def test_without_a_positive_scale_only_the_gradient_changes(device: str, packed: bool, scale: float) -> None:
    require(device)
    weights, exp_avg, exp_avg_sq = run(device, packed)
    tensors = (weights.storage, weights.low_precision, exp_avg, exp_avg_sq)
    before = [tensor.clone() for tensor in tensors]
    gradient = gradients(device)[0]
    gradient[7], gradient[8], gradient[-1] = math.nan, math.inf, -math.inf
    update(weights, gradient, exp_avg, exp_avg_sq, scale, 21)
    assert not gradient.any()
    assert all(torch.equal(tensor, old) for tensor, old in zip(tensors, before, strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_packed_equals_full(device: str) -> None:
    require(device)
    full, packed = run(device, packed=False)[0], run(device, packed=True)[0]
    difference = (full.to_host().view(torch.int32) - packed.to_host().view(torch.int32)).abs()
    # A tie moves a number by one fp32 ulp, once in 65,536 updates; ulps may then grow apart a little.
    assert (difference != 0).double().mean() < 0.01
    assert difference.max() <= 4
    assert packed.storage.element_size() == 2


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("packed", [False, True])
def test_parameters_are_the_rounded_master_weights(device: str, packed: bool) -> None:
    require(device)
    weights = run(device, packed)[0]
    assert weights.count_differences(rounded=True) == 0
    assert torch.equal(weights.to_host().bfloat16(), weights.low_precision.cpu())


@pytest.mark.parametrize("size", [0, 1, 7, 8, (1 << 18) + 3])
@pytest.mark.parametrize("odd_start", [False, True])
def test_differences_are_counted_at_any_length_and_start(size: int, odd_start: bool) -> None:
    parameters = torch.randn(size + odd_start).bfloat16()[int(odd_start) :]
    weights = MasterWeights(parameters, packed=False)
    weights.storage *= 1 + 2**-12  # less than what rounding cuts off
    assert weights.count_differences(rounded=True) == 0
    assert weights.count_differences(rounded=False) == int(parameters.count_nonzero())
    if size:
        weights.storage[-1] = parameters[-1] + 1  # another number, whatever it was
        assert weights.count_differences(rounded=True) == 1
        parameters[-1] = weights.storage[-1] = float("nan")
        assert weights.count_differences(rounded=True) == 0, "a NaN is as a NaN"
    if size > 1:
        parameters[0], weights.storage[0] = 0.0, -0.0
        assert weights.count_differences(rounded=True) == 0, "zeros are equal whatever their sign"


def test_pack_is_exact_but_at_ties() -> None:
    generator = torch.Generator().manual_seed(2)
    bits = torch.randint(-(2**31), 2**31, (1 << 18,), generator=generator).to(torch.int32)
    ties = (bits & ~0xFFFF) | 0x8000
    every = torch.cat([bits, ties, ties + 1, ties - 1, torch.tensor([0, -(2**31)], dtype=torch.int32)])
    master = every.view(torch.float32)
    master = master[torch.isfinite(master) & (master.abs() < 3e38)]
    rounded, low = pack(master)
    again = unpack(rounded, low)
    assert torch.equal(rounded, master.bfloat16()), "rounding to nearest, ties to even"
    assert torch.equal(again.bfloat16(), rounded), "what is unpacked rounds to the same"
    is_tie = (master.view(torch.int32) & 0xFFFF) == 0x8000
    assert torch.equal(again[~is_tie].view(torch.int32), master[~is_tie].view(torch.int32))
    assert ((again[is_tie].view(torch.int32) - master[is_tie].view(torch.int32)).abs() == 1).all()


@pytest.mark.parametrize("packed", [False, True])
def test_saved_numbers_come_back(packed: bool) -> None:
    weights = run("cpu", packed)[0]
    saved = weights.to_host()
    other = MasterWeights(torch.zeros(SIZE, dtype=torch.bfloat16), packed)
    other.load(saved)
    assert torch.equal(other.to_host(), saved)
    assert torch.equal(other.low_precision, weights.low_precision)
    other.reset()
    assert torch.equal(other.to_host(), weights.low_precision.float())
