"""Weight gradients that are added to fp32 buffers, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from neox_core.parallel.weight_gradients import accumulate_in


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_accumulates_over_micro_batches(device: str, dtype: torch.dtype) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    torch.manual_seed(0)
    linear = nn.Linear(64, 48, bias=False).to(device, dtype)
    accumulator, marks = torch.zeros(48, 64, device=device), []
    accumulate_in(linear, accumulator, lambda: marks.append(1))
    exact = torch.zeros(48, 64, dtype=torch.float64)
    for _ in range(8):
        x = torch.randn(2, 16, 64).to(device, dtype).requires_grad_()
        upstream = torch.randn(2, 16, 48).to(device, dtype)
        linear(x).backward(upstream)
        rows, columns = upstream.flatten(0, 1).cpu().double(), x.detach().flatten(0, 1).cpu().double()
        exact += rows.t() @ columns
        expected = (rows @ linear.weight.detach().cpu().double()).view_as(x)
        tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(x.grad.cpu().double(), expected, rtol=tolerance, atol=tolerance)
    assert linear.weight.grad is None, "nothing is left for another accumulation"
    assert len(marks) == 8
    # Sums of bf16 products in fp32: far below what a bf16 accumulator could hold (relative 4e-3).
    torch.testing.assert_close(accumulator.cpu().double(), exact, rtol=1e-4, atol=1e-4)


def test_without_gradients_it_is_the_plain_layer() -> None:
    linear = nn.Linear(8, 4, bias=False)
    expected = linear(torch.ones(2, 8)).detach()
    accumulate_in(linear, torch.zeros(4, 8), lambda: None)
    with torch.no_grad():
        assert torch.equal(linear(torch.ones(2, 8)), expected)
