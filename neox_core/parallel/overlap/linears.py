"""Linear layers whose inputs are gathered, or whose outputs are summed, while they are computed.

Both do what `SplitRegion.enter`, `linear_outputs` and `SplitRegion.leave` do one after the other, with the same
results. Alongside them: products of the rows that are there already, and weight gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from neox_core.model.add_norm import Addends, add
from neox_core.parallel.overlap.exchange import Exchange
from neox_core.parallel.weight_gradients import Accumulator, accumulators_of


def gathered_outputs(
    part: Tensor, exchange: Exchange, keep: Callable[[Tensor], Tensor], *linears: nn.Linear
) -> tuple[Tensor, ...]:
    """Products of the gathered tokens with linear layers that have accumulators. Biases are not added.

    Args:
        part: this rank's tokens [B,T/ranks,D].
        keep: is told the gathered tokens [B,T,D], which can be gathered again.

    Returns:
        For each layer, [B,T,out].
    """
    batch, tokens, width = part.shape
    gathering = exchange.begin_gather(part.detach().contiguous().view(-1, width))
    whole = keep(gathering.whole_ND.view(batch, tokens * exchange.size, width))
    weights = [linear.weight for linear in linears]
    outputs: tuple[Tensor, ...] = _GatheredLinears.apply(part, whole, exchange, accumulators_of(*linears), *weights)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for rows, values in gathering.arrivals():
            for output, weight in zip(outputs, weights, strict=True):
                torch.mm(values, weight.t(), out=output.detach().flatten(0, 1)[rows])
    return outputs


def summed_output(x: Tensor, exchange: Exchange, linear: nn.Linear) -> Addends:
    """This rank's tokens of the sum of all ranks' products with a linear layer that has an accumulator.

    Args:
        x: [B,T,in].

    Returns:
        This rank's own product and the others', [B,T/ranks,out] each, since what they are added to next can add all at
        once. The others' are outside of autograd's graph.
    """
    part: Tensor = _SummedLinear.apply(x, exchange, accumulators_of(linear), linear.weight)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        rows_NI, own_MD = x.detach().flatten(0, 1), part.detach().flatten(0, 1)
        scattering = exchange.begin_scatter(len(own_MD), own_MD.shape[1], x.dtype)
        for rows, place in scattering.sends():
            torch.mm(rows_NI[rows], linear.weight.t(), out=place)
        torch.mm(_own_rows(rows_NI, exchange), linear.weight.t(), out=own_MD)
        return part, *(other.view_as(part) for other in scattering.others())


def _own_rows(rows_ND: Tensor, exchange: Exchange) -> Tensor:
    """A rank's part of all tokens."""
    return rows_ND.tensor_split(exchange.size)[exchange.rank]


class _GatheredLinears(torch.autograd.Function):
    """As weight_gradients' own: outputs are made but not computed, so that autograd has saved the input before."""

    @staticmethod
    def forward(
        ctx: Any, part: Tensor, whole: Tensor, exchange: Exchange, accumulators: Sequence[Accumulator], *weights: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(whole, *weights)
        ctx.exchange, ctx.accumulators, ctx.shape = exchange, accumulators, part.shape
        return tuple(whole.new_empty(*whole.shape[:-1], weight.shape[0]) for weight in weights)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        whole, *weights = ctx.saved_tensors
        batch, tokens, width = ctx.shape
        flat = [gradient.flatten(0, 1) for gradient in gradients]
        scattering = ctx.exchange.begin_scatter(batch * tokens, width, whole.dtype)
        for rows, place in scattering.sends():
            torch.mm(flat[0][rows], weights[0], out=place)
            for gradient, weight in zip(flat[1:], weights[1:], strict=True):
                place.addmm_(gradient[rows], weight)  # the product adds: no pass for the sum
        for accumulator, gradient in zip(ctx.accumulators, flat, strict=True):
            accumulator.add(gradient, whole.flatten(0, 1))
        d_part = add(*scattering.others())
        for gradient, weight in zip(flat, weights, strict=True):
            d_part.addmm_(_own_rows(gradient, ctx.exchange), weight)
        return d_part.view(ctx.shape), None, None, None, *[None] * len(weights)


class _SummedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, exchange: Exchange, accumulators: Sequence[Accumulator], weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.exchange, ctx.accumulators = exchange, accumulators
        return x.new_empty(x.shape[0], x.shape[1] // exchange.size, weight.shape[0])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        gathering = ctx.exchange.begin_gather(gradient.contiguous().view(-1, gradient.shape[-1]))
        d_x = torch.empty_like(x)
        for rows, values in gathering.arrivals():
            torch.mm(values, weight, out=d_x.flatten(0, 1)[rows])
        (accumulator,) = ctx.accumulators
        accumulator.add(gathering.whole_ND, x.flatten(0, 1))
        return d_x, None, None, None
