"""AdamW as one Triton kernel; see adamw.py for what it computes."""

# Triton reads a kernel's annotations when it compiles, so they must not be strings.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl
from torch import Tensor

from neox_core.optimizer.master_weights import MasterWeights

_BLOCK = 2048


def launch(
    weights: MasterWeights,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    factors: Tensor,
    constants: tuple[float, float, float, float],
) -> None:
    """Run the kernel over a partition.

    Args:
        factors: gradient factor, lr / (1 - beta1^number), sqrt(1 - beta2^number), fp32 [3].
        constants: beta1, beta2, eps and the weights' factor, 1 - lr x weight decay.
    """
    beta1, beta2, eps, decay = constants
    size = gradient.numel()
    _adamw[(triton.cdiv(size, _BLOCK),)](
        weights.low_precision,
        weights.storage,
        gradient,
        exp_avg,
        exp_avg_sq,
        factors,
        size,
        decay,
        beta1,
        beta2,
        eps,
        PACKED=weights.packed,
        BLOCK=_BLOCK,
        num_warps=8,
    )


@triton.jit
def _adamw(
    low_precision,
    storage,
    gradient,
    exp_avg,
    exp_avg_sq,
    factors,
    size,
    keep,
    beta1,
    beta2,
    eps,
    PACKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    scale = tl.load(factors)
    rate = tl.load(factors + 1)
    bias_correction2_sqrt = tl.load(factors + 2)
    exists = at < size
    inside = exists & (scale > 0)  # no update: nothing is read or written but the gradient's zeros
    g = tl.load(gradient + at, mask=inside, other=0.0) * scale
    mean = tl.load(exp_avg + at, mask=inside, other=0.0)
    square = tl.load(exp_avg_sq + at, mask=inside, other=0.0)
    mean = mean + (1 - beta1) * (g - mean)
    square = beta2 * square + (1 - beta2) * g * g
    if PACKED:
        low = tl.load(storage + at, mask=inside, other=0).to(tl.int32) & 0xFFFF
        high = tl.load(low_precision + at, mask=inside, other=0.0).to(tl.int16, bitcast=True).to(tl.int32)
        high = high - (low > 0x8000).to(tl.int32)
        master = ((high << 16) | low).to(tl.float32, bitcast=True)
    else:
        master = tl.load(storage + at, mask=inside, other=0.0)
    denominator = tl.sqrt_rn(square) / bias_correction2_sqrt + eps
    master = master * keep - rate * (mean / denominator)
    rounded = master.to(low_precision.dtype.element_ty)
    if PACKED:
        bits = master.to(tl.int32, bitcast=True)
        up = (rounded.to(tl.int16, bitcast=True).to(tl.int32) - (bits >> 16)) & 1
        bits = tl.where((bits & 0xFFFF) == 0x8000, bits + 2 * up - 1, bits)
        tl.store(storage + at, bits.to(tl.int16), mask=inside)
    else:
        tl.store(storage + at, master, mask=inside)
    tl.store(low_precision + at, rounded, mask=inside)
    tl.store(exp_avg + at, mean, mask=inside)
    tl.store(exp_avg_sq + at, square, mask=inside)
    tl.store(gradient + at, tl.zeros_like(g), mask=exists)
