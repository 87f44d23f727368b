"""Weights that several tensor-parallel ranks hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from neox_core.checkpoint.formats.tensor_map import QKV, Form, iterate_layers, stored_tensors
from neox_core.config import ModelConfig
from neox_core.model import ModelDimensions, TransformerBlock
from neox_core.parallel.replicas import ReplicatedGradients, shared_elements
from neox_core.parallel.sharding import ROWS, mark_parameters, set_sharding
from tests.distributed import run_ranks

MODEL = ModelConfig(
    num_layers=1, hidden_size=64, num_attention_heads=8, num_kv_heads=2, intermediate_size=96, vocab_size=128,
    rope_theta=1e4,
)  # fmt: skip


@pytest.mark.parametrize("ranks", [4, 8])
def test_shared_rows_are_those_that_checkpoints_replicate(ranks: int) -> None:
    dims = ModelDimensions.of(MODEL, 16)
    block = TransformerBlock(dims.shard(ranks))
    mark_parameters(block, dims, ranks, tokens_split=False)
    layer = list(iterate_layers(MODEL))[1]
    (fused,) = (t for t in stored_tensors(layer, MODEL, Form.NEOX, ranks, part=1) if t.name == QKV)
    expected = {row for stored in fused.blocks if stored.replica == 1 for row in stored.at_rows}
    before, after = nn.Parameter(torch.zeros(3, 5)), nn.Parameter(torch.zeros(2, 2))
    set_sharding(before, ROWS)
    set_sharding(after, ROWS)
    found = shared_elements([before, block.attention.query_key_value.weight, after])
    assert [element for run in found for element in run] == [
        15 + row * 64 + column for row in sorted(expected) for column in range(64)
    ]


ELEMENTS = [range(1, 4), range(6, 9), range(10, 12)]
"""Of 12, which two partitions of 6 hold."""


def reduce_parts() -> list[Tensor]:
    """Per partition: the sum on this rank."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    rank, results = dist.get_rank(), []
    whole = torch.arange(12.0) * (1 + 9 * rank)
    for first in (0, 6):
        part = whole[first : first + 6].clone()
        shared = ReplicatedGradients(part, first, ELEMENTS, dist.group.WORLD)
        shared.sum()
        results.append(part)
    nothing = torch.ones(3)
    empty = ReplicatedGradients(nothing, 12, ELEMENTS, dist.group.WORLD)
    empty.sum()
    assert bool((nothing == 1).all())
    dist.destroy_process_group()
    return results


def test_pieces_are_summed() -> None:
    ranks: list[Any] = run_ranks(reduce_parts, 2)
    shared = [element for run in ELEMENTS for element in run]
    for number in range(2):
        parts = [rank[number] for rank in ranks]
        for element in range(6):
            value = 6.0 * number + element
            expected = (11 * value,) * 2 if value in shared else (value, 10 * value)
            assert (float(parts[0][element]), float(parts[1][element])) == expected
