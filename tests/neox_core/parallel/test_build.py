"""Building one rank's layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from neox_core.config import ActivationCheckpointing
from neox_core.model import FinalNorm, ModelDimensions, OutputHead, TokenEmbedding, TransformerBlock
from neox_core.parallel.build import build_layer, layer_types
from neox_core.parallel.parallelize import Parallelism
from neox_core.parallel.ranks.mesh import Mesh

DIMS = ModelDimensions(
    hidden_size=32, num_heads=4, num_kv_heads=2, head_dim=8, intermediate_size=48, vocab_size=12,
    rope_theta=1e4, norm_eps=1e-5, sequence_length=16,
)  # fmt: skip
ONE_RANK = Mesh(
    rank=0, local_rank=0, world_size=1, tensor_rank=0, tensor_size=1, pipeline_rank=0,
    pipeline_size=1, data_rank=0, data_size=1, tensor_group=cast(Any, None), device=torch.device("cpu"),
)  # fmt: skip


def test_layer_numbers_are_neox() -> None:
    """Embedding 0, transformer layer l at l + 2, final norm at L + 3, output at L + 4."""
    types = layer_types(3)
    assert {index: kind for index, kind in enumerate(types) if kind} == {
        0: TokenEmbedding,
        2: TransformerBlock,
        3: TransformerBlock,
        4: TransformerBlock,
        6: FinalNorm,
        7: OutputHead,
    }


def weights_of(dtype: torch.dtype) -> Callable[[int, int], dict[str, Tensor]]:
    """The same random block at every index."""
    torch.manual_seed(1)
    state = TransformerBlock(DIMS).to(dtype).state_dict()
    return lambda index, rank: {name: tensor.clone() for name, tensor in state.items()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weights_are_loaded_in_the_asked_dtype(dtype: torch.dtype) -> None:
    weights = weights_of(torch.bfloat16)
    block = build_layer(TransformerBlock, 2, Parallelism(ONE_RANK, DIMS), weights, dtype)
    assert {p.dtype for p in block.parameters()} == {dtype}
    for name, tensor in block.state_dict().items():
        assert torch.equal(tensor, weights(2, 0)[name].to(dtype)), name
    assert {buffer.dtype for buffer in block.buffers()} == {torch.float32}
    assert all(p.device.type == "cpu" for p in (*block.parameters(), *block.buffers()))


def test_the_right_part_is_asked_for() -> None:
    asked = []
    weights = weights_of(torch.float32)

    def record(index: int, rank: int) -> dict[str, Tensor]:
        asked.append((index, rank))
        return weights(index, rank)

    place = Parallelism(replace(ONE_RANK, tensor_rank=3), DIMS)
    build_layer(TransformerBlock, 17, place, record, torch.float32)
    assert asked == [(17, 3)]


def test_layers_lack_rotation_by_their_number_in_the_whole_model() -> None:
    dims = replace(DIMS, layers_without_rope=(1, 14))
    for index in (2, 3, 16, 17):
        place = Parallelism(replace(ONE_RANK, pipeline_rank=1, pipeline_size=2), dims)
        block: Any = build_layer(TransformerBlock, index, place, weights_of(torch.float32), torch.float32)
        assert bool(block.attention.rotary.sin.any()) == (index - 2 not in (1, 14))


@pytest.mark.parametrize("change", ["missing", "extra", "shape"])
def test_weights_that_do_not_fit_are_refused(change: str) -> None:
    state = weights_of(torch.float32)(2, 0)
    if change == "missing":
        del state["mlp.w3.weight"]
    elif change == "extra":
        state["mlp.w4.weight"] = torch.zeros(1)
    else:
        state["mlp.w3.weight"] = torch.zeros(24, 32)
    with pytest.raises(RuntimeError, match=r"mlp\.w[34]\.weight"):
        build_layer(TransformerBlock, 2, Parallelism(ONE_RANK, DIMS), lambda index, rank: state, torch.float32)


def run_block(mode: ActivationCheckpointing) -> tuple[Tensor, list[Tensor | None], int]:
    """Output, gradients and how often attention was computed in one training step."""
    place = Parallelism(ONE_RANK, DIMS, mode)
    block: Any = build_layer(TransformerBlock, 2, place, weights_of(torch.float32), torch.float32)
    calls: list[nn.Module] = []
    block.attention.rotary.register_forward_hook(lambda module, args, output: calls.append(module))
    x = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(2)).requires_grad_()
    output = block(x)
    output.square().sum().backward()
    return output.detach(), [x.grad, *(p.grad for p in block.parameters())], len(calls)


def test_recomputation_changes_nothing_but_the_work() -> None:
    output, gradients, computed = run_block("none")
    again, gradients_again, computed_again = run_block("full")
    assert (computed, computed_again) == (1, 2)
    assert torch.equal(output, again)
    for gradient, other in zip(gradients, gradients_again, strict=True):
        assert gradient is not None
        assert other is not None
        assert torch.equal(gradient, other)
