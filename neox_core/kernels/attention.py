"""The attention kernels: their names, where they run and how they are loaded. Nothing here needs torch until one is.

`train.attention` accepts the names in this table. A new kernel is one more entry, or a call of `register`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from neox_core.errors import ConfigError

if TYPE_CHECKING:  # so that a configuration is read without torch
    import torch
    from torch import Tensor

    AttentionFunction = Callable[[Tensor, Tensor, Tensor], Tensor]
    """(q [B,T,N,H], k [B,T,K,H], v [B,T,K,H]) -> [B,T,N,H]; query head n attends with KV head n // (N / K)."""

logger = logging.getLogger(__name__)

AUTO = "auto"
"""The fastest kernel that is installed."""


@dataclass(frozen=True)
class AttentionKernel:
    """A causal attention, forward and backward."""

    name: str
    load: Callable[[], AttentionFunction]
    """Imports what it needs and returns the function; ImportError if that is not installed."""
    anywhere: bool = False
    """Runs on every device in every dtype; otherwise on CUDA devices, in bf16 and fp16."""
    hopper: bool = False
    """Needs a GPU of compute capability 9.0 or later."""
    install: str = "install it"
    """How to get what `load` imports."""


def _flash_attn_4() -> AttentionFunction:
    from flash_attn.cute import flash_attn_func

    return lambda q, k, v: flash_attn_func(q, k, v, causal=True)[0]


def _flash_attn() -> AttentionFunction:
    from flash_attn import flash_attn_func

    return lambda q, k, v: flash_attn_func(q, k, v, causal=True)


def _cudnn() -> AttentionFunction:
    from neox_core.kernels.scaled_dot_product import cudnn

    return cudnn


def _cudnn_or_sdpa() -> AttentionFunction:
    from neox_core.kernels.scaled_dot_product import cudnn_or_sdpa

    return cudnn_or_sdpa


def _sdpa() -> AttentionFunction:
    from neox_core.kernels.scaled_dot_product import sdpa

    return sdpa


_SDPA = AttentionKernel("sdpa", _sdpa, anywhere=True)
_CUDNN_OR_SDPA = AttentionKernel("cudnn or sdpa", _cudnn_or_sdpa)  # a choice of `auto` only
_KERNELS = {
    kernel.name: kernel
    for kernel in (
        AttentionKernel("flash_attn_4", _flash_attn_4, hopper=True, install='pip install "flash-attn-4[cu13]"'),
        AttentionKernel("flash_attn", _flash_attn, install="pip install flash-attn --no-build-isolation"),
        AttentionKernel("cudnn", _cudnn),
        _SDPA,
    )
}


def register(kernel: AttentionKernel) -> None:
    """Let `train.attention` name one more kernel, in this process.

    Raises:
        ValueError: the name is taken.
    """
    if kernel.name in names():
        raise ValueError(f"there is an attention kernel {kernel.name!r} already")
    _KERNELS[kernel.name] = kernel


def unregister(name: str) -> None:
    """Take back what `register` did."""
    del _KERNELS[name]
    attention_function.cache_clear()


def names() -> tuple[str, ...]:
    """What `train.attention` can be."""
    return (AUTO, *_KERNELS)


def check_name(name: str) -> str:
    """The name, if there is such a kernel.

    Raises:
        ValueError: there is none; the message lists those that there are.
    """
    if name not in names():
        raise ValueError(f"there is no attention kernel {name!r}: use one of {', '.join(names())}")
    return name


@cache
def attention_function(name: str, device_type: str, dtype: torch.dtype) -> AttentionFunction:
    """Choose and load the kernel, and log which one it is.

    Raises:
        ConfigError: it is not installed, or does not run on the device with this dtype.
    """
    kernel, function = _choose(name, device_type, dtype)
    logger.info("attention: %s", kernel.name)
    return function


def _choose(name: str, device_type: str, dtype: torch.dtype) -> tuple[AttentionKernel, AttentionFunction]:
    import torch

    short = str(dtype).removeprefix("torch.")
    if device_type != "cuda" or short not in ("bfloat16", "float16"):
        kernel = _SDPA if name == AUTO else _KERNELS[name]
        if not kernel.anywhere:
            raise ConfigError(
                f"train.attention {name} runs on CUDA devices in bf16 only, and this is {device_type} in {short}: "
                "set train.attention: auto"
            )
        return kernel, _load(kernel)
    hopper = torch.cuda.get_device_capability() >= (9, 0)
    if name == AUTO:
        return _fastest(hopper)
    kernel = _KERNELS[name]
    if kernel.hopper and not hopper:
        raise ConfigError(f"train.attention {name} needs a Hopper GPU or a later one: set train.attention: auto")
    return kernel, _load(kernel)


def _fastest(hopper: bool) -> tuple[AttentionKernel, AttentionFunction]:
    """Measured: on Hopper, cuDNN runs at twice the rate of FlashAttention-2 and FlashAttention-4 is ahead of both."""
    first, fallback = (
        (_KERNELS["flash_attn_4"], _CUDNN_OR_SDPA) if hopper else (_KERNELS["flash_attn"], _SDPA)
    )  # the fallbacks come with torch
    try:
        return first, first.load()
    except ImportError:
        return fallback, fallback.load()


def _load(kernel: AttentionKernel) -> AttentionFunction:
    try:
        return kernel.load()
    except ImportError as error:
        raise ConfigError(
            f"train.attention {kernel.name} cannot be imported ({error}): {kernel.install}, "
            "or set train.attention: auto"
        ) from error
