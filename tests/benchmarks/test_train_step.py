"""What the training benchmark gives its ranks."""

from __future__ import annotations

import torch

from benchmarks.train_step import parse_options, random_weights, run_config
from neox_core.model import ModelDimensions
from neox_core.parallel.sharding import key_value_rows


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
