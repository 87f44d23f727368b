"""An engine on tensors without data: they can't carry what pipeline stages tell each other in numbers."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.utils import PartitionedTensor
from torch import Tensor

from neox_core.config import RunConfig
from neox_core.parallel.precision import parameter_dtype
from neox_core.train.engine.training_engine import TrainingEngine

_META = 16
"""Numbers that describe a partitioned tensor: its shape, the number of parts and where they begin; about."""


def state_shapes(engine: TrainingEngine, config: RunConfig) -> None:
    """Give a stage the shapes that it would receive: hidden states, whole or a part per tensor-parallel rank."""
    train = config.train
    split = config.parallel.tensor if config.parallel.sequence else 1
    shape = torch.Size((train.micro_batch_size, train.sequence_length // split, config.model.hidden_size))
    dtype = parameter_dtype(config)
    partitioned, parts = engine.is_pipe_partitioned, config.parallel.tensor

    def receive(_stage: int) -> Any:
        hidden = torch.empty(shape.numel() // parts if partitioned else shape, dtype=dtype)
        tensors = [torch.empty(_META, dtype=torch.long), hidden] if partitioned else [hidden]
        if train.mask_documents:
            tensors.append(torch.empty(train.micro_batch_size, train.sequence_length, dtype=torch.long))
        return tensors[0] if len(tensors) == 1 else tuple(tensors)

    def from_meta(meta: Tensor, local_part: Tensor, group: Any, device: Any = None) -> PartitionedTensor:
        part = PartitionedTensor.__new__(PartitionedTensor)
        part.group, part.num_parts, part.rank = group, dist.get_world_size(group), dist.get_rank(group)
        part.orig_size, part.orig_device = list(shape), local_part.device
        part.local_data, part.even_split = local_part.detach(), True
        return part

    engine._recv_tensor_meta = receive
    PartitionedTensor.from_meta = staticmethod(from_meta)
