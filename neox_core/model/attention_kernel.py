"""Causal attention kernels behind one function: flash-attn where it is installed, cuDNN on other GPUs, else SDPA."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from neox_core.model.document_attention import masked_attention

logger = logging.getLogger(__name__)

AttentionKernel = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(q [B,T,N,H], k [B,T,K,H], v [B,T,K,H]) -> [B,T,N,H]; query head n attends with KV head n // (N / K)."""


def causal_attention(q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor, positions_BT: Tensor | None = None) -> Tensor:
    """Softmax(q k^T / sqrt(H)) v over earlier positions, in the fastest kernel that is at hand.

    Args:
        positions_BT: position of each token within its document, over which attention does not reach.
    """
    if positions_BT is not None:
        return masked_attention(q_BTNH, k_BTKH, v_BTKH, positions_BT)
    half_precision = q_BTNH.dtype in (torch.bfloat16, torch.float16)
    kernel = attention_kernel(q_BTNH.device.type, half_precision)
    return kernel(q_BTNH, k_BTKH, v_BTKH)


@cache
def attention_kernel(device_type: str, half_precision: bool) -> AttentionKernel:
    """Choose the kernel once, and log which one it is."""
    if device_type == "cuda" and half_precision:
        try:
            from flash_attn import flash_attn_func

            logger.info("attention: flash-attn")
            return lambda q, k, v: flash_attn_func(q, k, v, causal=True)
        except ImportError:
            logger.info("attention: cuDNN through torch SDPA, since flash-attn is not installed")
            return _cudnn
    return _sdpa


def _cudnn(q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor) -> Tensor:
    backends = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(backends, set_priority=True):
        return _sdpa(q_BTNH, k_BTKH, v_BTKH)


def _sdpa(q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q_BTNH, k_BTKH, v_BTKH))
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped).transpose(1, 2)
