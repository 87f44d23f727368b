"""In which type products are computed."""

from __future__ import annotations

import torch
from torch import Tensor

from neox_core.kernels.dispatch import Kernel


@Kernel
def arithmetic_type(x: Tensor) -> torch.dtype:
    """A tensor's own type; fp32 for 16-bit numbers on a CPU.

    Most CPUs have no 16-bit arithmetic, and torch's stand-in for it made the demo 7 times as slow. The result is to be
    rounded once, at the end. A simulated GPU takes this function's place.
    """
    return torch.float32 if x.device.type == "cpu" and x.dtype.itemsize == 2 else x.dtype
