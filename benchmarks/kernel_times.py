"""Where a step's time goes on the device, from the kernels that the profiler saw."""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterable

import torch

# Kernel names of each part; the first that matches counts. The head's products are among "gemm". Only the loss's
# compiled kernels have a softmax in their names.
PARTS = {
    "exchange": r"nccl",
    "gemm": r"gemm|nvjet|cutlass_80|cutlass_90|wgmma_bf16|cublas",
    "attention": r"flash|fmha|cudnn.*sdpa|attention",
    "optimizer": r"adam|multi_tensor|foreach",
    "loss": r"triton.*(softmax|nll_loss)",
    "elementwise": r"triton|_rms_norm_backward|_add_rows|^_rotate",
    "other elementwise": r"elementwise|reduce|copy|cat|fill|norm|Memcpy|Memset|index|embedding",
}


def kernel_times(step: Callable[[], object]) -> tuple[dict[str, float], str]:
    """Seconds of one step by part, and a table of the slowest kernels.

    Parts are sums over kernels, which may run at the same time. "exposed" is when only exchanges between GPUs ran,
    "gaps" when nothing did.
    """
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        start = time.perf_counter()  # the profiler's own start takes longer than all gaps
        step()
        torch.cuda.synchronize()
        wall = time.perf_counter() - start
    seconds: dict[str, float] = defaultdict(float)
    spans: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
    for event in profiler.events() or ():
        if event.device_type != torch.autograd.DeviceType.CUDA or event.name.startswith(("nccl:", "ProfilerStep")):
            continue  # type: ignore[unreachable]
        part = next((part for part, names in PARTS.items() if re.search(names, event.name, re.I)), "other")
        span = event.time_range.start / 1e6, event.time_range.end / 1e6
        seconds[part] += span[1] - span[0]
        spans[part == "exchange"].append(span)
    computing, busy = _covered(spans[False]), _covered(spans[False] + spans[True])
    seconds |= {"exposed": busy - computing, "gaps": wall - busy}
    table = profiler.key_averages().table(sort_by="cuda_time_total", row_limit=30, max_name_column_width=80)
    return {part: round(value, 4) for part, value in seconds.items()}, table


def _covered(spans: Iterable[tuple[float, float]]) -> float:
    """Length of the union."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total
