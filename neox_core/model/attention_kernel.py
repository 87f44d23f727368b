"""Causal attention kernels behind one function, chosen once by name or as the fastest that is at hand."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from neox_core.errors import ConfigError
from neox_core.model.document_attention import masked_attention

logger = logging.getLogger(__name__)

AttentionBackend = Literal["auto", "flash_attn_4", "flash_attn", "cudnn", "sdpa"]

AttentionKernel = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(q [B,T,N,H], k [B,T,K,H], v [B,T,K,H]) -> [B,T,N,H]; query head n attends with KV head n // (N / K)."""


def causal_attention(
    q_BTNH: Tensor,
    k_BTKH: Tensor,
    v_BTKH: Tensor,
    positions_BT: Tensor | None = None,
    backend: AttentionBackend = "auto",
) -> Tensor:
    """Softmax(q k^T / sqrt(H)) v over earlier positions.

    Args:
        positions_BT: position of each token within its document, over which attention does not reach. Such masks have
            a kernel of their own, whatever the backend.
        backend: the kernel to use. fp32, and CPUs, have SDPA only.
    """
    if positions_BT is not None:
        return masked_attention(q_BTNH, k_BTKH, v_BTKH, positions_BT)
    return attention_kernel(backend, q_BTNH.device.type, q_BTNH.dtype)(q_BTNH, k_BTKH, v_BTKH)


@cache
def attention_kernel(backend: AttentionBackend, device_type: str, dtype: torch.dtype) -> AttentionKernel:
    """Choose the kernel, and log which one it is.

    Raises:
        ConfigError: the backend is not installed, or does not run on the device with this dtype.
    """
    name, kernel = _choose(backend, device_type, dtype)
    logger.info("attention: %s", name)
    return kernel


def _choose(backend: AttentionBackend, device_type: str, dtype: torch.dtype) -> tuple[str, AttentionKernel]:
    if device_type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        if backend not in ("auto", "sdpa"):
            raise ConfigError(
                f"train.attention {backend} runs on CUDA devices in bf16 only, and this is {device_type} in "
                f"{str(dtype).removeprefix('torch.')}: set train.attention: auto"
            )
        return "sdpa", _sdpa
    hopper = torch.cuda.get_device_capability() >= (9, 0)
    if backend == "flash_attn_4" and not hopper:
        raise ConfigError("train.attention flash_attn_4 needs a Hopper GPU or a later one: set train.attention: auto")
    for name in _fastest_first(hopper) if backend == "auto" else (backend,):
        try:
            kernel = _KERNELS[name]()
        except ImportError as error:
            if backend == "auto":
                continue
            raise ConfigError(
                f"train.attention {name} cannot be imported ({error}): {_INSTALL[name]}, or set train.attention: auto"
            ) from error
        return name, kernel
    raise AssertionError("SDPA is always there")


def _fastest_first(hopper: bool) -> tuple[str, ...]:
    """Measured: on Hopper, cuDNN runs at twice the rate of FlashAttention-2 and FlashAttention-4 is ahead of both."""
    return ("flash_attn_4", "cudnn or sdpa") if hopper else ("flash_attn", "sdpa")


def _flash_attn_4() -> AttentionKernel:
    from flash_attn.cute import flash_attn_func

    return lambda q, k, v: flash_attn_func(q, k, v, causal=True)[0]


def _flash_attn() -> AttentionKernel:
    from flash_attn import flash_attn_func

    return lambda q, k, v: flash_attn_func(q, k, v, causal=True)


def _cudnn(q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return _sdpa(q_BTNH, k_BTKH, v_BTKH)


def _cudnn_or_sdpa(q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor) -> Tensor:
    """cuDNN where it takes these sizes."""
    backends = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(backends, set_priority=True):
        return _sdpa(q_BTNH, k_BTKH, v_BTKH)


def _sdpa(q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q_BTNH, k_BTKH, v_BTKH))
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped).transpose(1, 2)


_KERNELS: dict[str, Callable[[], AttentionKernel]] = {
    "flash_attn_4": _flash_attn_4,
    "flash_attn": _flash_attn,
    "cudnn": lambda: _cudnn,
    "cudnn or sdpa": lambda: _cudnn_or_sdpa,
    "sdpa": lambda: _sdpa,
}
_INSTALL = {
    "flash_attn_4": 'pip install "flash-attn-4[cu13]"',
    "flash_attn": "pip install flash-attn --no-build-isolation",
}
