"""Causal attention of a row of tokens, or of the documents in it, by the kernel of a given name."""

from __future__ import annotations

from torch import Tensor

from neox_core.kernels.attention import AUTO, attention_function
from neox_core.kernels.dispatch import Kernel
from neox_core.model.document_attention import masked_attention


@Kernel
def causal_attention(
    q_BTNH: Tensor,
    k_BTKH: Tensor,
    v_BTKH: Tensor,
    positions_BT: Tensor | None = None,
    backend: str = AUTO,
) -> Tensor:
    """Softmax(q k^T / sqrt(H)) v over earlier positions.

    Args:
        positions_BT: position of each token within its document, over which attention does not reach. Such masks have
            a kernel of their own, whatever the backend.
        backend: name of the kernel (kernels/attention.py). fp32, and CPUs, have SDPA only.
    """
    if positions_BT is not None:
        return masked_attention(q_BTNH, k_BTKH, v_BTKH, positions_BT)
    return attention_function(backend, q_BTNH.device.type, q_BTNH.dtype)(q_BTNH, k_BTKH, v_BTKH)
