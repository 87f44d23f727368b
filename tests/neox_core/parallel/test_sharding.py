"""How parameters say that ranks hold them: against checkpoints, the planner and DeepSpeed."""

from __future__ import annotations

import pytest
import torch
from deepspeed.runtime.utils import is_model_parallel_parameter
from torch import nn

from neox_core.checkpoint.formats.tensor_map import iterate_layers
from neox_core.config import RunConfig, load_config
from neox_core.config.families import FAMILIES, FamilyName
from neox_core.errors import ConfigError
from neox_core.model import ModelDimensions, TransformerBlock
from neox_core.parallel.build import layer_types
from neox_core.parallel.replicas import partial_elements, replicated_elements
from neox_core.parallel.sharding import (
    COLUMNS,
    HEAD_NORM,
    ROWS,
    TOKEN_NORM,
    Sharding,
    mark_parameters,
    set_sharding,
    sharding_of,
)
from neox_core.planning.memory import rank_parameters, replicated_parameters
from tests.paths import CONFIGS

CONFIG = load_config(CONFIGS / "llemma_34b.yml")


def marked(layer_type: type[nn.Module], config: RunConfig, tokens_split: bool = False) -> nn.Module:
    """A layer without data in a rank's dimensions."""
    dims, ranks = ModelDimensions.of(config.model, 16), config.parallel.tensor
    with torch.device("meta"):
        layer = layer_type(dims.shard(ranks))
    mark_parameters(layer, dims, ranks, tokens_split)
    return layer


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpoints_split_the_same_dimensions(family: FamilyName) -> None:
    model = CONFIG.model.model_copy(update={"num_layers": 1, "family": family})
    dims = ModelDimensions.of(model, 1)
    kinds = [kind for kind in layer_types(1) if kind is not None]
    for tensors, kind in zip(iterate_layers(model), kinds, strict=True):
        with torch.device("meta"):
            layer = kind(dims)
        mark_parameters(layer, dims, 1, tokens_split=False)
        marks = {name: sharding_of(parameter).split for name, parameter in layer.named_parameters()}
        assert {tensor.neox: tensor.neox_split for tensor in tensors.tensors} == marks


@pytest.mark.parametrize("pipeline", [1, 4])
def test_the_planner_counts_llamas_parameters(pipeline: int) -> None:
    config = CONFIG.model_copy(update={"parallel": CONFIG.parallel.model_copy(update={"pipeline": pipeline})})
    layers = config.model.num_layers // pipeline
    config = config.model_copy(
        update={"parallel": config.parallel.model_copy(update={"pipeline_layers": (layers,) * pipeline})}
    )
    model, ranks = config.model, config.parallel.tensor
    for stage in range(pipeline):
        last = stage == pipeline - 1
        norms = (2 * layers + last) * model.hidden_size
        vocabulary = model.hidden_size * model.vocab_size // ranks
        heads = 2 * model.num_attention_heads // ranks + 2 * max(1, model.num_kv_heads // ranks)
        block = model.hidden_size * (heads * model.head_dim + 3 * model.intermediate_size // ranks)
        expected = layers * block + norms + ((stage == 0) + last) * vocabulary
        assert rank_parameters(config, stage) == expected
        assert replicated_parameters(config, stage) == norms


def test_deepspeed_is_told_what_is_split() -> None:
    block = marked(TransformerBlock, CONFIG)
    for name, parameter in block.named_parameters():
        assert is_model_parallel_parameter(parameter) == ("layernorm" not in name), name


@pytest.mark.parametrize("tokens_split", [False, True])
def test_norms_have_partial_gradients_where_tokens_are_split(tokens_split: bool) -> None:
    block = marked(TransformerBlock, CONFIG, tokens_split)
    for name, parameter in block.named_parameters():
        assert sharding_of(parameter).partial_gradient == (tokens_split and "layernorm" in name), name


def parameter(sharding: Sharding, *shape: int) -> nn.Parameter:
    made = nn.Parameter(torch.zeros(shape))
    set_sharding(made, sharding)
    return made


def test_where_replicated_parameters_lie() -> None:
    parameters = [
        parameter(ROWS, 2, 3),
        parameter(TOKEN_NORM, 4),
        parameter(HEAD_NORM, 5),
        parameter(COLUMNS, 2, 2),
        parameter(HEAD_NORM, 1),
    ]
    assert replicated_elements(parameters) == [range(6, 15), range(19, 20)]
    assert partial_elements(parameters) == [range(10, 15), range(19, 20)]
    with pytest.raises(ConfigError, match=r"parameter \(unnamed\) of shape \[2\]"):
        replicated_elements([*parameters, nn.Parameter(torch.zeros(2))])
