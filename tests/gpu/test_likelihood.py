"""Likelihoods of texts in padded batches on a GPU against each alone in fp32 on the CPU.

pytest -m gpu tests/gpu
"""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch import nn

from neox_core.evaluation.likelihood import Request, log_likelihoods
from neox_core.model import FinalNorm, ModelDimensions, OutputHead, TokenEmbedding, TransformerBlock
from tests.neox_core.train.small_training import MODELS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def layers_of(dims: ModelDimensions) -> nn.Sequential:
    torch.manual_seed(0)
    blocks = [TransformerBlock(dims) for _ in range(3)]
    return nn.Sequential(TokenEmbedding(dims), *blocks, FinalNorm(dims), OutputHead(dims))


def test_padded_batches(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    layers = layers_of(ModelDimensions.of(MODELS["gqa"], 512))
    generator = torch.Generator().manual_seed(1)
    lengths = [3, 64, 65, 66, 97, 130, 200, 257, 300, 400, 512]  # in 9 padded lengths
    requests = [
        Request(tuple(torch.randint(1, 128, (length + 1,), generator=generator).tolist()), min(length, 5))
        for length in lengths
    ]
    mesh: Any = SimpleNamespace(device=torch.device("cpu"), tensor_group=dist.group.WORLD, tensor_rank=0)
    alone = [log_likelihoods(layers, [request], 1, mesh, False)[0] for request in requests]
    mesh.device = torch.device("cuda")
    for dtype, tolerance in ((torch.float32, 2e-2), (torch.bfloat16, 0.3)):
        found = log_likelihoods(cast(Any, copy.deepcopy(layers)).to("cuda", dtype), requests, 1024, mesh, False)
        assert found == pytest.approx(alone, abs=tolerance)
    dist.destroy_process_group()
