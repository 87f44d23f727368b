"""dtypes that follow from the configuration."""

from __future__ import annotations

import torch

from neox_core.config import RunConfig


def parameter_dtype(config: RunConfig) -> torch.dtype:
    """dtype of the parameters in forward and backward."""
    return torch.bfloat16 if config.train.precision == "bf16" else torch.float32
