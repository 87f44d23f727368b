"""What the hardware could do at most, for utilisation figures."""

from __future__ import annotations

import time

import torch

from neox_core.kernels.arithmetic import arithmetic_type

# Dense bf16 tensor-core rates in TFLOP/s, from the vendors' datasheets.
_PEAK_TFLOPS = {"A100": 312.0, "H100 PCIe": 756.0, "H100": 989.0, "H200": 989.0, "B200": 2250.0, "A10G": 70.0}


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of one device: the datasheet's figure for a known GPU in bf16, otherwise a measured matrix product's."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for known, tflops in _PEAK_TFLOPS.items():
            if known in name:
                return tflops * 1e12
    return _measured_gemm_flops(device, dtype)


def _measured_gemm_flops(device: torch.device, dtype: torch.dtype, repeats: int = 3) -> float:
    """Best rate of a square matrix product, in FLOP/s."""
    size = 4096 if device.type == "cuda" else 256  # large enough for the device, and a moment's work
    matrix = torch.randn(size, size, device=device).to(dtype)
    matrix = matrix.to(arithmetic_type(matrix))
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        matrix @ matrix
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
