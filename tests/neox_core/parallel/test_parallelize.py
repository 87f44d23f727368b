"""The steps by which a layer becomes parallel: their order, and that none of them replaces a forward."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from neox_core.config import ActivationCheckpointing
from neox_core.errors import ConfigError
from neox_core.model import FinalNorm, OutputHead, TokenEmbedding, TransformerBlock
from neox_core.model.llama import RMSNorm
from neox_core.parallel.layers import FusedBlock, PipelineLayer
from neox_core.parallel.parallelize import (
    STEPS,
    Parallelism,
    checkpoint_activations,
    fuse,
    mark_parameters,
    parallelize,
    split_among_ranks,
)
from neox_core.parallel.weight_gradients import AccumulatingLinear, AccumulatingNorm, accumulate_gradients
from tests.neox_core.parallel.test_build import DIMS, ONE_RANK

LAYERS = (TokenEmbedding, TransformerBlock, FinalNorm, OutputHead)
MODES: tuple[ActivationCheckpointing, ...] = ("none", "selective", "full")


def test_order_of_the_steps() -> None:
    names = ["mark_parameters", "accept_accumulators", "fuse", "split_among_ranks", "checkpoint_activations"]
    assert [step.__name__ for step in STEPS] == names


def test_what_a_layer_is_before_each_step() -> None:
    layer: nn.Module = TransformerBlock(DIMS)
    seen = []
    for step in STEPS:
        seen.append((type(layer), isinstance(layer.attention.dense, AccumulatingLinear)))  # type: ignore[union-attr]
        layer = step(layer, Parallelism(ONE_RANK, DIMS))
    plain, fused = TransformerBlock, FusedBlock
    assert seen == [(plain, False), (plain, False), (plain, True), (fused, True), (fused, True)]


def test_steps_refuse_another_order() -> None:
    place = Parallelism(ONE_RANK, DIMS)
    with pytest.raises(ConfigError, match="does not say how"):
        mark_parameters(fuse(TransformerBlock(DIMS), place), place)
    with pytest.raises(AssertionError):
        split_among_ranks(TransformerBlock(DIMS), place)
    with pytest.raises(AssertionError):
        checkpoint_activations(TransformerBlock(DIMS), place)


def everything(layer_type: type[nn.Module], mode: ActivationCheckpointing, tensor: int) -> PipelineLayer:
    """A layer with all that training can ask for, buffers included."""
    mesh = replace(ONE_RANK, tensor_size=tensor, sequence_parallel=tensor > 1)
    layer = parallelize(layer_type(DIMS.shard(tensor)), Parallelism(mesh, DIMS, mode))
    parameters = list(layer.parameters())
    optimizer: Any = SimpleNamespace(
        bf16_groups=[parameters],
        fp32_groups_gradients=[[torch.zeros(p.numel()) for p in parameters]],
        on_gradient=lambda group, index: None,
    )
    accumulate_gradients(layer, optimizer)
    return layer


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layer_type", LAYERS)
def test_no_forward_is_replaced(layer_type: type[nn.Module], mode: ActivationCheckpointing, tensor: int) -> None:
    layer = everything(layer_type, mode, tensor)
    for name, part in layer.named_modules():
        replaced = [key for key, value in vars(part).items() if callable(getattr(type(part), key, None))]
        assert not replaced, f"{name}: {replaced}"
        assert not part._forward_hooks, name
        assert not part._forward_pre_hooks, name
    linears = [part for part in layer.modules() if isinstance(part, nn.Linear)]
    assert all(isinstance(part, AccumulatingLinear) and part.accumulator is not None for part in linears)
    if isinstance(layer, FusedBlock):
        norms = [part for part in layer.children() if isinstance(part, RMSNorm)]
        assert norms
        assert all(isinstance(part, AccumulatingNorm) and part.accumulator is not None for part in norms)


@pytest.mark.parametrize("layer_type", LAYERS)
def test_names_and_order_of_the_weights_stay(layer_type: type[nn.Module]) -> None:
    plain = layer_type(DIMS)
    expected = [(name, id(parameter)) for name, parameter in plain.named_parameters()]
    layer = parallelize(plain, Parallelism(ONE_RANK, DIMS))
    assert [(name, id(parameter)) for name, parameter in layer.named_parameters()] == expected
    assert list(layer.state_dict()) == [name for name, _ in expected]


def test_a_parameter_without_a_mark_is_refused_by_name() -> None:
    block = TransformerBlock(DIMS)
    block.attention.register_parameter("query_norm", nn.Parameter(torch.ones(8)))
    message = r"parameter TransformerBlock\.attention\.query_norm of shape \[8\] does not say how"
    with pytest.raises(ConfigError, match=message):
        parallelize(block, Parallelism(ONE_RANK, DIMS))
