"""Weight gradients that the matrix product adds straight to fp32 buffers.

A linear layer's own backward pass yields a bf16 gradient, which then is converted and added to the fp32 accumulator:
three passes over memory per micro batch, and a rounding to bf16 before the sum. Here the product accumulates in place.
So does a norm's backward pass, which is small, but is launched as often.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neox_core.kernels.aligned import aligned_rows, empty_rows, parts
from neox_core.kernels.arithmetic import arithmetic_type
from neox_core.kernels.dispatch import Kernel
from neox_core.model.llama import RMSNorm


class DeferredGradients:
    """Weight gradients that are added some micro batches later, when a pipeline stage would wait for another.

    A backward pass owes the stage before it the gradient of its inputs alone: nobody waits for weights' gradients
    before the update (arXiv 2401.10241). Until they are added, the inputs and the outputs' gradients of the linear
    layers stay in memory. Micro batches come in their order, so that the sums are the same bit for bit.
    """

    def __init__(self) -> None:
        self._micro_batches: deque[deque[Callable[[], None]]] = deque()
        self._open: deque[Callable[[], None]] | None = None

    @contextmanager
    def defer(self) -> Iterator[None]:
        """Around a micro batch's backward pass, whose weight gradients are to wait."""
        self._open = deque()
        try:
            yield
            self._micro_batches.append(self._open)
        finally:
            self._open = None

    def take(self, addition: Callable[[], None]) -> None:
        """Do it later, within `defer`; else now."""
        if self._open is None:
            addition()
        else:
            self._open.append(addition)

    def add_next(self) -> None:
        """Add those of the micro batch that has waited longest, in the order of its backward pass."""
        additions = self._micro_batches.popleft()
        while additions:
            additions.popleft()()  # and lets go of its tensors

    def forget(self) -> None:
        """Nothing waits."""
        self._micro_batches.clear()


@dataclass(frozen=True)
class Accumulator:
    """Where the gradient of a linear layer's weight or of a norm's scale goes."""

    buffer: Tensor
    """fp32, in the parameter's shape."""
    on_gradient: Callable[[], None]
    """Called after each addition."""
    deferred: DeferredGradients | None = None
    """Takes additions of products; None: each is done at once."""

    def add(self, gradient_MO: Tensor, x_MI: Tensor) -> None:
        """Add gradient^T x, of a linear layer's input and its output's gradient, now or when the time has come."""
        if self.deferred is None:
            self._add(gradient_MO, x_MI)
        else:
            # Detached, since a tensor that knows its graph keeps the stage's inputs, and their gradients.
            self.deferred.take(partial(self._add, gradient_MO.detach(), x_MI.detach()))

    @torch.no_grad()
    def _add(self, gradient_MO: Tensor, x_MI: Tensor) -> None:
        for part in parts(len(self.buffer)):
            add_outer_product(self.buffer[part], gradient_MO[:, part], x_MI)
        self.on_gradient()


class AccumulatingLinear(nn.Linear):
    """A linear layer whose weight gradient goes to its accumulator, once that is set; until then, to `weight.grad`.

    The buffers belong to the optimizer, which is made after the layers.
    """

    accumulator: Accumulator | None = None

    @classmethod
    def of(cls, linear: nn.Linear) -> Self:
        """The same layer with the same parameters."""
        made = cls(linear.in_features, linear.out_features, bias=False, device="meta")
        made.weight, made.bias = linear.weight, linear.bias
        return made

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]"""
        (product,) = linear_outputs(x, self)
        return product if self.bias is None else product + self.bias


class AccumulatingNorm(RMSNorm):
    """A norm whose scale's gradient goes to its accumulator, once that is set (see add_norm); until then, to autograd.

    What calls it as a module alone leaves it to autograd.
    """

    accumulator: Accumulator | None = None

    @classmethod
    def of(cls, norm: RMSNorm) -> Self:
        """The same norm with the same scale."""
        made = cls(len(norm.scale), norm.eps)
        made.scale = norm.scale
        return made


def linear_outputs(x: Tensor, *linears: nn.Linear) -> tuple[Tensor, ...]:
    """Products of linear layers of the same input, whose gradient is then summed by the products themselves.

    Biases are not added.
    """
    weights = [linear.weight for linear in linears]
    accumulators = accumulators_of(*linears)
    if not accumulators or not torch.is_grad_enabled():
        return tuple(product(x, weight) for weight in weights)
    outputs: tuple[Tensor, ...] = _AccumulatingLinears.apply(x, accumulators, *weights)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for output, weight in zip(outputs, weights, strict=True):
            for part in parts(len(weight)):
                torch.mm(x.flatten(0, -2), weight[part].t(), out=output.detach().flatten(0, -2)[:, part])
    return outputs


def accumulators_of(*linears: nn.Linear) -> list[Accumulator]:
    """Those that are set."""
    return [a for linear in linears if (a := getattr(linear, "accumulator", None)) is not None]


class _AccumulatingLinears(torch.autograd.Function):
    """Linear layers of one input, whose outputs are made but not computed.

    So autograd has saved the input before the products: a checkpoint that only wanted the last of a block's inputs
    stops there, and w2's product is not computed again.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, accumulators: Sequence[Accumulator], *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, *weights)
        ctx.accumulators = accumulators
        return tuple(empty_rows(x, x.shape[:-1], weight.shape[0]) for weight in weights)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        flat = [aligned_rows(gradient.flatten(0, -2)) for gradient in gradients]
        for accumulator, gradient in zip(ctx.accumulators, flat, strict=True):
            accumulator.add(gradient, x.flatten(0, -2))
        return _input_gradient(flat, weights).view(x.shape), None, *[None] * len(weights)


def _input_gradient(gradients_MO: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """Of the linear layers' common input, [M,I]: the products add up, without a pass for the sum."""
    (gradient, weight), *others = (
        (gradient[:, part], weight[part])
        for gradient, weight in zip(gradients_MO, weights, strict=True)
        for part in reversed(parts(len(weight)))  # the sum is rounded each time: few columns come first
    )
    d_x = gradient @ weight
    for gradient, weight in others:
        d_x.addmm_(gradient, weight)
    return d_x


def product(x: Tensor, weight: Tensor) -> Tensor:
    """[..., in] x weight [out, in] -> [..., out]"""
    dtype = arithmetic_type(x)
    return F.linear(x.to(dtype), weight.to(dtype)).to(x.dtype)


@Kernel
def add_outer_product(accumulator: Tensor, gradient_MO: Tensor, x_MI: Tensor) -> None:
    """accumulator [O,I] += gradient^T x, with products and sums in fp32."""
    if accumulator.is_cuda and x_MI.dtype != torch.float32:
        torch.ops.aten.addmm.dtype_out(
            accumulator, gradient_MO.t(), x_MI, torch.float32, beta=1, alpha=1, out=accumulator
        )
    else:
        accumulator.addmm_(gradient_MO.t().float(), x_MI.float())


def accept_accumulators(module: nn.Module) -> None:
    """Give all linear layers within a module, but not the module itself, a place for an accumulator."""
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Linear:
                setattr(parent, name, AccumulatingLinear.of(child))


def accumulate_gradients(module: nn.Module, optimizer: Any, deferred: DeferredGradients | None = None) -> None:
    """Let every part of a module that takes an accumulator, and has none, add its gradient to DeepSpeed's.

    Args:
        optimizer: the ShardedOptimizer, which owns the accumulators.
        deferred: see Accumulator.
    """
    places = {id(p): (g, i) for g, group in enumerate(optimizer.bf16_groups) for i, p in enumerate(group)}
    for part in module.modules():
        if not isinstance(part, AccumulatingLinear | AccumulatingNorm) or part.accumulator is not None:
            continue
        parameter = part.weight if isinstance(part, AccumulatingLinear) else part.scale
        group, index = places[id(parameter)]
        buffer = optimizer.fp32_groups_gradients[group][index].view(parameter.shape)
        part.accumulator = Accumulator(buffer, partial(optimizer.on_gradient, group, index), deferred)
