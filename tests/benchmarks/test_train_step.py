"""What the training benchmark gives its ranks."""

from __future__ import annotations

import os
from typing import Any

import torch

from benchmarks import train_step
from benchmarks.train_step import parse_options, random_weights, run_config, slowest_gemm
from neox_core.model import ModelDimensions
from neox_core.parallel.ranks.mesh import init_distributed
from neox_core.parallel.sharding import key_value_rows
from tests.distributed import run_ranks


def test_ranks_that_share_keys_and_values_have_the_same_weights_of_them() -> None:
    config = run_config(parse_options(["tiny", "--tp", "4"]), 4)
    assert config.model.num_kv_heads == 2
    weights = random_weights(config, torch.device("cpu"))
    first, second, third, _ = (weights(2, rank)["attention.query_key_value.weight"] for rank in range(4))
    shared = [row for rows in key_value_rows(ModelDimensions.of(config.model, 1).shard(4)) for row in rows]
    own = [row for row in range(len(first)) if row not in shared]
    assert torch.equal(first[shared], second[shared])
    assert not torch.equal(second[shared], third[shared])
    assert not torch.equal(first[own], second[own])


def slowest() -> tuple[float, list[Any]]:
    """The rate that a rank compares with, and what it measured."""
    config = run_config(parse_options(["tiny", "--tp", "2", "--micro-batch", "2", "--sequence-length", "64"]), 2)
    device, measured = init_distributed(config.launch), list[Any]()

    def gemm(*arguments: Any) -> float:
        measured.extend(arguments)
        return 5.0 if os.environ["RANK"] == "0" else 3.0

    train_step.sustained_gemm = gemm  # in a process of its own
    return slowest_gemm(config, device, 0.5), measured[1:]


def test_the_slower_gpu_counts() -> None:
    """Of a rank's part of the products, for the tokens of a micro batch."""
    assert run_ranks(slowest, 2) == [(3.0, [2, 128, torch.device("cpu"), 0.5])] * 2
