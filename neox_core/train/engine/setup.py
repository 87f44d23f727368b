"""What DeepSpeed needs of the process before an engine is built, and its settings for the recipe."""

from __future__ import annotations

from typing import Any

import deepspeed
import torch.distributed as dist
from deepspeed.runtime import compiler

from neox_core.config import BatchGeometry, RunConfig


def attach_deepspeed() -> None:
    """Let DeepSpeed use the process group that there is."""
    # Its optimizer imports Muon, which is not used here, and with it torch's compiler: seconds of each rank's start.
    compiler.compile = lambda: compiler.dummy_decorator
    if dist.get_backend() != "nccl":
        # Otherwise DeepSpeed compiles a C++ extension for a minute, and needs a compiler.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=dist.get_backend(), dist_init_required=False, verbose=False)


def deepspeed_config(config: RunConfig, geometry: BatchGeometry) -> dict[str, Any]:
    """DeepSpeed's own settings for the recipe."""
    # Between stages, DeepSpeed would split activations among tensor-parallel ranks as if they had the same.
    partitioned = not config.parallel.sequence
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": geometry.micro_batch_size,
        "gradient_accumulation_steps": geometry.accumulation_steps,
        "gradient_clipping": config.train.gradient_clip,
        "zero_optimization": {"stage": 1},
        "pipeline": {"use_reentrant": False, "pipe_partitioned": partitioned, "grad_partitioned": partitioned},
        "checkpoint": {"parallel_write": {"pipeline_stage": True}},
        "steps_per_print": 10**9,
    }
    if config.train.precision == "bf16":
        settings["bf16"] = {"enabled": True, "immediate_grad_update": True}
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
        # Without it the fp32 gradients are cast to bf16 before the data-parallel sum.
        settings["communication_data_type"] = "fp32"
    return settings
