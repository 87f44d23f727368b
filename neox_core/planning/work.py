"""What one rank computes and moves for a token of a layer, by arithmetic. Symbols as in memory.py."""

from __future__ import annotations

from dataclasses import dataclass

from neox_core.config import ActivationCheckpointing, RunConfig
from neox_core.model import ModelDimensions
from neox_core.planning.activations import DTYPE_BYTES
from neox_core.planning.hardware import Hardware

ATTENTION_SHARE = 0.85
"""Of its rate alone that attention reaches between the products of a power-capped card: 0.57 for 0.48 s on an H200."""
ELEMENTWISE_SHARE = 0.73
"""Of a copy's bandwidth that compiled elementwise functions reach on the H200, where a profile was taken."""
_BACKWARD_ATTENTION = 2.5
"""Products of attention's backward pass, in those of its forward pass: five for two (arXiv 2205.14135)."""


@dataclass(frozen=True)
class LayerTime:
    """Seconds of one transformer layer and token on one rank, forward and backward."""

    products: float
    attention: float
    elementwise: float
    recomputation: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.products + self.attention + self.elementwise + self.recomputation


def layer_time(
    config: RunConfig, dims: ModelDimensions, mode: ActivationCheckpointing, hardware: Hardware
) -> LayerTime:
    """Time of a layer's kernels, without exchanges.

    Args:
        dims: one rank's.
    """
    products = _products(dims) / hardware.gemm
    last_product = 2 * dims.hidden_size * dims.intermediate_size / hardware.gemm
    scores = 2 * dims.num_heads * dims.head_dim * config.train.sequence_length
    attention = scores / (ATTENTION_SHARE * hardware.attention_forward)
    bandwidth = ELEMENTWISE_SHARE * hardware.memory
    forward, backward = (size / bandwidth for size in _elementwise_bytes(config, dims))
    repeated = {
        "none": 0.0,
        "selective": attention + forward,
        "full": attention + forward + products - last_product,
    }
    return LayerTime(
        products=3 * products,
        attention=attention + _BACKWARD_ATTENTION * scores / (ATTENTION_SHARE * hardware.attention_backward),
        elementwise=forward + backward,
        recomputation=repeated[mode],
    )


def head_time(dims: ModelDimensions, hardware: Hardware) -> float:
    """Seconds of the output head and the loss for a token, forward and backward.

    Logits are computed by chunks, kept in cache as far as it reaches: their passes over memory are not counted.
    """
    return 3 * 2 * dims.hidden_size * dims.vocab_size / hardware.gemm


def _products(dims: ModelDimensions) -> float:
    heads = (2 * dims.num_heads + 2 * dims.num_kv_heads) * dims.head_dim
    return 2 * dims.hidden_size * (heads + 3 * dims.intermediate_size)


def _elementwise_bytes(config: RunConfig, dims: ModelDimensions) -> tuple[float, float]:
    """Bytes read and written per token by elementwise functions, forward and backward.

    Forward: two sums with their norms read two tensors and write two; the rotation reads the fused projection and
    writes it (in place it leaves values alone, which is not counted); SwiGLU reads two and writes one. Backward: each
    norm reads three and writes one; the rotation as forward; SwiGLU reads three and writes two, and its result once
    more.

    A norm after attention or MLP reads two and writes one, and backward reads two and writes one, with a sum of two
    gradients next to it. Norms of queries and keys read these once more backward.
    """
    size = DTYPE_BYTES[config.train.precision]
    split = config.parallel.tensor if config.parallel.sequence else 1
    forward, backward = (3, 6) if dims.norms_after else (4, 4)
    norm = 2 * size * dims.hidden_size / split
    rotation = 2 * size * dims.head_dim * (dims.num_heads + 2 * dims.num_kv_heads)
    again = size * dims.head_dim * (dims.num_heads + dims.num_kv_heads) if dims.qk_norm else 0
    width = size * dims.intermediate_size
    return forward * norm + rotation + 3 * width, backward * norm + rotation + again + 5.5 * width
