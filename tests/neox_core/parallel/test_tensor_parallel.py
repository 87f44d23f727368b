"""Layers cut in two compute what the whole layers compute, forward and backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from neox_core.config import LaunchConfig, ParallelConfig
from neox_core.model import FinalNorm, ModelDimensions, OutputHead, TokenEmbedding, TransformerBlock
from neox_core.parallel.layers import ChunkedHead, SplitEmbedding
from neox_core.parallel.parallelize import Parallelism, parallelize
from tests.distributed import run_ranks
from tests.neox_core.model.reference import fuse_qkv

RANKS = 2
HEADS, KV_HEADS, HEAD_DIM = 8, 2, 8
DIMS = ModelDimensions(
    hidden_size=32, num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM, intermediate_size=48, vocab_size=12,
    rope_theta=1e4, norm_eps=1e-5, sequence_length=16,
)  # fmt: skip
LAYERS: tuple[type[nn.Module], ...] = (TokenEmbedding, TransformerBlock, FinalNorm, OutputHead)
IDS = torch.tensor([[0, 5, 6, 11, 5, 1], [7, 7, 2, 9, 10, 3]])
"""Both halves of the vocabulary, their borders, and ids that come twice."""

Weights = dict[str, Tensor]


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def weights(layer_type: type[nn.Module], rank: int | None) -> Weights:
    """A rank's part of the layer's weights, or the whole (None), cut by heads and columns as DESIGN describes."""

    def part(weight: Tensor, dim: int = 0) -> Tensor:
        return weight if rank is None else weight.chunk(RANKS, dim)[rank]

    if layer_type is TokenEmbedding:
        return {"word_embeddings.weight": part(random(12, 32, seed=1))}
    if layer_type is OutputHead:
        return {"final_linear.weight": part(random(12, 32, seed=2) / 6)}
    if layer_type is FinalNorm:
        return {"norm.scale": 1 + random(32, seed=3) / 4}
    query, key, value = (random(n * HEAD_DIM, 32, seed=n) / 6 for n in (HEADS, KV_HEADS, KV_HEADS))
    ranks = 1 if rank is None else RANKS
    fused = fuse_qkv(part(query), part(key), part(value), HEADS // ranks, KV_HEADS // ranks)
    return {
        "input_layernorm.scale": 1 + random(32, seed=4) / 4,
        "attention.query_key_value.weight": fused,
        "attention.dense.weight": part(random(32, HEADS * HEAD_DIM, seed=5) / 8, dim=1),
        "post_attention_layernorm.scale": 1 + random(32, seed=6) / 4,
        "mlp.w1.weight": part(random(48, 32, seed=7) / 6),
        "mlp.w2.weight": part(random(32, 48, seed=8) / 7, dim=1),
        "mlp.w3.weight": part(random(48, 32, seed=9) / 6),
    }


def tokens_of(x: Tensor, rank: int) -> Tensor:
    """A rank's half of the tokens, as memory has them."""
    return x.flatten(0, 1).chunk(RANKS)[rank].unflatten(0, (2, 3))


def whole_batch(parts: list[Tensor]) -> Tensor:
    """What `tokens_of` cut."""
    return torch.cat([part.flatten(0, 1) for part in parts]).unflatten(0, (2, 6))


def pass_through(layer: nn.Module, rank: int | None, sequence: bool = False) -> dict[str, Any]:
    """Output, and the gradients of the input and of every weight, for a fixed gradient of the output."""
    embedding, head = isinstance(layer, TokenEmbedding | SplitEmbedding), isinstance(layer, OutputHead | ChunkedHead)
    x = IDS if embedding else random(2, 6, 32, seed=10)
    upstream = random(2, 6, 12 if head else 32, seed=11)
    if head and rank is not None:
        upstream = upstream.chunk(RANKS, -1)[rank]
    elif sequence and rank is not None:
        upstream = tokens_of(upstream, rank)
    if not embedding:
        x = (tokens_of(x, rank) if sequence and rank is not None else x).requires_grad_()
    output = layer.project(layer(x)) if isinstance(layer, ChunkedHead) else layer(x)
    output.backward(upstream)
    return {
        "output": output.detach(),
        "input gradient": None if embedding else x.grad,
        "gradients": {name: p.grad for name, p in layer.named_parameters()},
    }


def operators(group: Any, rank: int) -> dict[str, Tensor]:
    """What the two conjugate operators make of rank + 1, forward and backward."""
    from neox_core.parallel.tensor_parallel import copy_to_ranks, sum_over_ranks

    x = torch.full((2, 3), rank + 1.0).requires_grad_()
    copied, summed, of_view = copy_to_ranks(x, group), sum_over_ranks(x, group), sum_over_ranks(x.T, group)
    upstream = torch.full((2, 3), 10.0 * (rank + 1))
    of_copy = torch.autograd.grad(copied, x, upstream)[0]
    of_sum = torch.autograd.grad(summed, x, upstream)[0]
    tensors = {"x": x, "upstream": upstream, "copied": copied, "summed": summed, "summed view": of_view}
    return tensors | {"of_copy": of_copy, "of_sum": of_sum}


def compute_all() -> dict[Any, Any]:
    """Everything that one of two ranks computes."""
    from neox_core.parallel.ranks.mesh import build_mesh, init_distributed

    device = init_distributed(LaunchConfig(device="cpu"))
    results: dict[Any, Any] = {}
    for sequence in (False, True):
        mesh = build_mesh(ParallelConfig(tensor=RANKS, sequence=sequence), device)
        results["operators"] = operators(mesh.tensor_group, mesh.rank)
        for layer_type in LAYERS:
            layer = layer_type(DIMS.shard(RANKS))
            layer.load_state_dict(weights(layer_type, mesh.tensor_rank))
            layer = parallelize(layer, Parallelism(mesh, DIMS))
            results[layer_type, sequence] = pass_through(layer, mesh.tensor_rank, sequence)
    return results


@pytest.fixture(scope="module")
def ranks() -> list[dict[Any, Any]]:
    return run_ranks(compute_all, RANKS)


def test_conjugate_operators(ranks: list[dict[Any, Any]]) -> None:
    for rank, result in enumerate(result["operators"] for result in ranks):
        assert bool((result["copied"] == rank + 1).all())
        assert bool((result["summed"] == 1 + 2).all())
        assert bool((result["summed view"] == 1 + 2).all())
        assert bool((result["of_copy"] == 10 + 20).all())
        assert bool((result["of_sum"] == 10 * (rank + 1)).all())
        # Neither operator changes what it was given.
        assert bool((result["x"] == rank + 1).all())
        assert bool((result["upstream"] == 10 * (rank + 1)).all())


def whole(layer_type: type[nn.Module]) -> dict[str, Any]:
    layer = layer_type(DIMS)
    layer.load_state_dict(weights(layer_type, None))
    return pass_through(layer, None)


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("layer_type", LAYERS)
def test_forward_and_input_gradient(ranks: list[dict[Any, Any]], layer_type: type[nn.Module], sequence: bool) -> None:
    expected = whole(layer_type)
    outputs = [rank[layer_type, sequence]["output"] for rank in ranks]
    gradients = [rank[layer_type, sequence]["input gradient"] for rank in ranks]
    if layer_type is OutputHead:
        outputs = [torch.cat(outputs, dim=-1)]
    elif sequence:
        outputs = [whole_batch(outputs)]
    if sequence and layer_type is not TokenEmbedding:
        gradients = [whole_batch(gradients)]
    for output in outputs:
        torch.testing.assert_close(output, expected["output"])
    for gradient in gradients:
        torch.testing.assert_close(gradient, expected["input gradient"])


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("layer_type", LAYERS)
def test_weight_gradients(ranks: list[dict[Any, Any]], layer_type: type[nn.Module], sequence: bool) -> None:
    """A split weight's gradient is its part of the whole one; a norm's is the whole one, the same on both ranks.

    Of ranks that split the tokens, each has its tokens' part of a norm's gradient.
    """
    expected = whole(layer_type)["gradients"]
    found = [rank[layer_type, sequence]["gradients"] for rank in ranks]
    for name, gradient in expected.items():
        if name.endswith("scale") and sequence:
            torch.testing.assert_close(found[0][name] + found[1][name], gradient, msg=name)
        elif name.endswith("scale"):
            assert torch.equal(found[0][name], found[1][name]), name
            torch.testing.assert_close(found[0][name], gradient, msg=name)
        else:
            dim = 1 if name in ("attention.dense.weight", "mlp.w2.weight") else 0
            # Whole heads lie on one rank, so that also the fused rows of two ranks, one after the other, are the whole.
            torch.testing.assert_close(torch.cat([rank[name] for rank in found], dim), gradient, msg=name)
