"""Weight gradients that are added to fp32 buffers, against float64."""

from __future__ import annotations

import gc
import itertools
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from neox_core.parallel.weight_gradients import AccumulatingLinear, Accumulator, DeferredGradients, linear_outputs


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("widths", [(48,), (48, 32), (43,), (43, 5, 16)], ids=str)
def test_accumulates_over_micro_batches(device: str, dtype: torch.dtype, widths: tuple[int, ...]) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    torch.manual_seed(0)
    linears = [AccumulatingLinear.of(nn.Linear(64, width, bias=False).to(device, dtype)) for width in widths]
    marks: list[int] = []
    buffers = [torch.zeros(width, 64, device=device) for width in widths]
    for linear, buffer in zip(linears, buffers, strict=True):
        linear.accumulator = Accumulator(buffer, lambda: marks.append(1))
    exact = [torch.zeros(width, 64, dtype=torch.float64) for width in widths]
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
    for _ in range(8):
        x = torch.randn(2, 16, 64).to(device, dtype).requires_grad_()
        upstreams = [torch.randn(2, 16, width).to(device, dtype) for width in widths]
        torch.autograd.backward(linear_outputs(x, *linears), upstreams)
        columns, d_x = x.detach().flatten(0, 1).cpu().double(), torch.zeros(32, 64, dtype=torch.float64)
        for linear, upstream, total in zip(linears, upstreams, exact, strict=True):
            rows = upstream.flatten(0, 1).cpu().double()
            total += rows.t() @ columns
            d_x += rows @ linear.weight.detach().cpu().double()
        assert x.grad is not None
        torch.testing.assert_close(x.grad.cpu().double(), d_x.view_as(x), rtol=tolerance, atol=2 * tolerance)
    assert all(linear.weight.grad is None for linear in linears), "nothing is left for another accumulation"
    assert len(marks) == 8 * len(widths)
    # Sums of bf16 products in fp32: far below what a bf16 accumulator could hold (relative 4e-3).
    for buffer, total in zip(buffers, exact, strict=True):
        torch.testing.assert_close(buffer.cpu().double(), total, rtol=1e-4, atol=1e-4)


class Products(TorchDispatchMode):
    """Notes the factors of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.factors: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            self.factors.append(args[-2:])
        return func(*args, **(kwargs or {}))


def test_of_an_uneven_width_few_columns_are_multiplied_apart() -> None:
    """All rows begin at multiples of 8, and the input's gradient is rounded after the few."""
    linear = AccumulatingLinear.of(nn.Linear(64, 43, bias=False))
    linear.accumulator = Accumulator(torch.zeros(43, 64), lambda: None)
    x = torch.randn(2, 16, 64, requires_grad=True)
    with Products() as products:
        output = linear(x)
        output.backward(torch.randn(2, 16, 43))
    assert output.stride() == (16 * 48, 48, 1)
    shapes = [(*first.shape, second.shape[1]) for first, second in products.factors]
    outputs, weight, inputs = [(32, 64, 40), (32, 64, 3)], [(40, 32, 64), (3, 32, 64)], [(32, 3, 64), (32, 40, 64)]
    assert shapes == outputs + weight + inputs
    for factor in itertools.chain(*products.factors):
        assert max(factor.stride()) % 8 == 0


def test_deferred_gradients_are_added_in_the_order_of_micro_batches() -> None:
    deferred, marks = DeferredGradients(), list[int]()
    linear = AccumulatingLinear.of(nn.Linear(4, 2, bias=False))
    buffer = torch.zeros(2, 4)
    linear.accumulator = Accumulator(buffer, lambda: marks.append(1), deferred)
    inputs = [torch.full((1, 4), value, requires_grad=True) for value in (1.0, 10.0)]
    for x in inputs:
        with deferred.defer():
            linear(x).sum().backward()
        assert x.grad is not None, "inputs' gradients are there"
    assert not marks
    assert not buffer.any()
    deferred.add_next()
    assert buffer.tolist() == [[1.0] * 4] * 2
    linear(inputs[0]).sum().backward()  # outside of `defer`: at once
    assert buffer.tolist() == [[2.0] * 4] * 2
    deferred.add_next()
    assert buffer.tolist() == [[12.0] * 4] * 2
    assert len(marks) == 3


def test_of_a_backward_pass_that_fails_and_of_what_is_forgotten_nothing_waits() -> None:
    deferred, done = DeferredGradients(), list[int]()

    def fail() -> None:
        with deferred.defer():
            deferred.take(lambda: done.append(1))
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    deferred.take(lambda: done.append(2))
    with deferred.defer():
        deferred.take(lambda: done.append(3))
    deferred.forget()
    with pytest.raises(IndexError):
        deferred.add_next()
    assert done == [2]


def test_what_waits_does_not_keep_the_inputs_gradients() -> None:
    """A tensor that knows its graph would."""
    deferred = DeferredGradients()
    first, second = nn.Linear(4, 4, bias=False), AccumulatingLinear.of(nn.Linear(4, 2, bias=False))
    second.accumulator = Accumulator(torch.zeros(2, 4), lambda: None, deferred)
    x = torch.ones(1, 4, requires_grad=True)
    with deferred.defer():
        second(first(x)).sum().backward()
    assert x.grad is not None
    gone = weakref.ref(x.grad)
    del x
    gc.collect()
    assert gone() is None


def test_without_gradients_it_is_the_plain_layer() -> None:
    plain = nn.Linear(8, 4, bias=False)
    linear = AccumulatingLinear.of(plain)
    linear.accumulator = Accumulator(torch.zeros(4, 8), lambda: None)
    with torch.no_grad():
        assert torch.equal(linear(torch.ones(2, 8)), plain(torch.ones(2, 8)))


def test_without_an_accumulator_it_is_the_plain_layer() -> None:
    plain = nn.Linear(8, 4, bias=False)
    linear = AccumulatingLinear.of(plain)
    assert linear.weight is plain.weight
    assert list(linear.state_dict()) == ["weight"]
    linear(torch.ones(2, 8)).sum().backward()
    assert plain.weight.grad is not None
    assert bool((plain.weight.grad == 2).all())
