"""Attention kernels that come with torch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from neox_core.kernels.arithmetic import arithmetic_type


def sdpa(q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor) -> Tensor:
    """Causal attention by torch's own choice: q [B,T,N,H], k and v [B,T,K,H] -> [B,T,N,H]"""
    dtype = arithmetic_type(q_BTNH)
    q, k, v = (x.transpose(1, 2).to(dtype) for x in (q_BTNH, k_BTKH, v_BTKH))
    grouped = q.shape[1] != k.shape[1]
    attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    return attended.transpose(1, 2).to(q_BTNH.dtype)


def cudnn(q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor) -> Tensor:
    """As sdpa, by cuDNN; RuntimeError where it does not take these sizes."""
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return sdpa(q_BTNH, k_BTKH, v_BTKH)


def cudnn_or_sdpa(q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor) -> Tensor:
    """As sdpa, by cuDNN where it takes these sizes."""
    backends = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(backends, set_priority=True):
        return sdpa(q_BTNH, k_BTKH, v_BTKH)
