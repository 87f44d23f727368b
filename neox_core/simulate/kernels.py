"""Stand-ins for what runs on GPUs: they keep and allocate what the GPU's kernels do, and compute nothing. (A rotation
in place makes new tensors here, of the same size, in place of the fused projection.)

Simulated tensors say that they are on a CPU, since autograd asks for a GPU's driver otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from neox_core.kernels.arithmetic import arithmetic_type
from neox_core.kernels.dispatch import Kernel, stand_ins
from neox_core.model import elementwise
from neox_core.model.attention_kernel import causal_attention
from neox_core.parallel.loss import logit_gradients, losses_of_parts, softmax_part, whole_vocabulary_losses
from neox_core.parallel.weight_gradients import add_outer_product
from neox_core.simulate.recorder import Recorder

_SCALES = 6
"""Which argument of split_and_rotate says that queries and keys are normalized, so that they are kept as they were."""

_OF_FUNCTIONS: tuple[Kernel[..., Any], ...] = (
    elementwise.add_all,
    elementwise.add_and_normalize,
    elementwise.normalize_and_add,
    elementwise.norm_gradients,
    softmax_part,
    losses_of_parts,
    logit_gradients,
)
"""Called forward and backward by functions of autograd's own."""


def gpu_kernels(recorder: Recorder) -> AbstractContextManager[None]:
    """Within it, the model, the loss and the linear layers keep and allocate what they do on a GPU."""

    def compiled(kernel: Kernel[..., Any], keeps: tuple[int, ...]) -> Callable[..., Any]:
        """One kernel forward and one backward, for which the arguments with these numbers are kept."""
        function = recorder.as_kernel(kernel.function)
        return lambda *args: _Compiled.apply(function, keeps, *args)  # type: ignore[no-untyped-call]

    rotated, normed = (compiled(elementwise.split_and_rotate, keeps) for keeps in ((1, 2), (0, 1, 2)))
    return stand_ins(
        {
            elementwise.rms_norm: compiled(elementwise.rms_norm, keeps=(0, 1)),
            elementwise.swiglu: compiled(elementwise.swiglu, keeps=(0, 1)),
            elementwise.split_and_rotate: lambda *args: (rotated if args[_SCALES] is None else normed)(*args),
            elementwise.mean_squares: compiled(elementwise.mean_squares, keeps=(0,)),
            **{kernel: recorder.as_kernel(kernel.function) for kernel in _OF_FUNCTIONS},
            causal_attention: _attention,
            whole_vocabulary_losses: compiled(whole_vocabulary_losses, keeps=(0, 1)),
            add_outer_product: _add_outer_product,
            arithmetic_type: lambda x: x.dtype,
        }
    )


class _Compiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernel: Callable[..., Any], keeps: tuple[int, ...], *args: Any) -> Any:
        ctx.save_for_backward(*(args[number] for number in keeps))
        ctx.wanted = [(x.shape, x.dtype) if isinstance(x, Tensor) and x.requires_grad else None for x in args]
        return kernel(*args)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        read = ctx.saved_tensors  # unpacks what is recomputed, which is there until the kernel has written its results
        assert read
        gradients = [None if x is None else torch.empty(x[0], dtype=x[1]) for x in ctx.wanted]
        return None, None, *gradients


def _attention(q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor, *_: Any) -> Tensor:
    """Keeps q, k, v, the result and a log-sum per query. Masks by document are made once and small."""
    q, k, v = (x.transpose(1, 2) for x in (q_BTNH, k_BTKH, v_BTKH))
    result: Tensor = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, True)[0]
    return result.transpose(1, 2)


def _add_outer_product(accumulator: Tensor, gradient_MO: Tensor, x_MI: Tensor) -> None:
    """The matrix product adds in place."""
    accumulator.add_(1)
