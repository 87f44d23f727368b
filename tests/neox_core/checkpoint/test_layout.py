from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from neox_core.checkpoint.layout import (
    QKV,
    concatenate,
    cut,
    fuse_qkv,
    halves_to_interleaved,
    interleaved_to_halves,
    iterate_layers,
    join,
    slice_of,
    split_qkv,
    to_huggingface,
    to_meta,
    to_neox,
)
from neox_core.config import ModelConfig
from neox_core.errors import CheckpointError

HEAD_DIM, COLUMNS = 8, 5


def numbered(rows: int, start: int) -> Tensor:
    """A matrix whose values name their place; as bf16 bit patterns, so that any arithmetic would show."""
    values = torch.arange(start, start + rows * COLUMNS, dtype=torch.int16)
    return values.view(torch.bfloat16).reshape(rows, COLUMNS)


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.int16)


def slow_fused(q: Tensor, k: Tensor, v: Tensor, heads: int, kv_heads: int, ranks: int, rank: int) -> Tensor:
    """Row by row from the description: per query head its q, then the next slices of the rank's k and of its v."""
    local_q = [q[row] for row in range(q.shape[0]) if row // HEAD_DIM // (heads // ranks) == rank]
    local_k = [k[row] for row in range(k.shape[0]) if row // HEAD_DIM // (kv_heads // ranks) == rank]
    local_v = [v[row] for row in range(v.shape[0]) if row // HEAD_DIM // (kv_heads // ranks) == rank]
    share = HEAD_DIM * kv_heads // heads
    rows: list[Tensor] = []
    for _ in range(heads // ranks):
        rows += [local_q.pop(0) for _ in range(HEAD_DIM)]
        rows += [local_k.pop(0) for _ in range(share)]
        rows += [local_v.pop(0) for _ in range(share)]
    assert not local_q
    assert not local_k
    assert not local_v
    return torch.stack(rows)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("kv_heads", [8, 4])
def test_fused_qkv_is_as_described(kv_heads: int, ranks: int) -> None:
    heads = 8
    q, k, v = numbered(heads * HEAD_DIM, 0), numbered(kv_heads * HEAD_DIM, 1000), numbered(kv_heads * HEAD_DIM, 2000)
    whole = fuse_qkv(q, k, v, HEAD_DIM)
    for rank in range(ranks):
        expected = slow_fused(q, k, v, heads, kv_heads, ranks, rank)
        of_rank = fuse_qkv(*(slice_of(part, 0, ranks, rank) for part in (q, k, v)), head_dim=HEAD_DIM)
        assert torch.equal(bits(of_rank), bits(expected))
        assert torch.equal(bits(cut({QKV: whole}, ranks, rank)[QKV]), bits(expected))
    for part, original in zip(split_qkv(whole, HEAD_DIM, heads // kv_heads), (q, k, v), strict=True):
        assert torch.equal(bits(part), bits(original))


def test_rope_rows_are_permuted_within_each_head() -> None:
    interleaved = numbered(3 * HEAD_DIM, 0)
    halves = interleaved_to_halves(interleaved, HEAD_DIM)
    for row in range(3 * HEAD_DIM):
        head, place = divmod(row, HEAD_DIM)
        odd, pair = divmod(place, HEAD_DIM // 2)
        assert torch.equal(bits(halves[row]), bits(interleaved[head * HEAD_DIM + 2 * pair + odd]))
    assert torch.equal(bits(halves_to_interleaved(halves, HEAD_DIM)), bits(interleaved))


def test_layers_and_names() -> None:
    layers = list(iterate_layers(2))
    assert [layer.index for layer in layers] == [0, 2, 3, 5, 6]
    assert layers[0].neox_names == ("word_embeddings.weight",)
    assert layers[1].neox_names == (
        "input_layernorm.scale",
        "attention.query_key_value.weight",
        "attention.dense.weight",
        "post_attention_layernorm.scale",
        "mlp.w1.weight",
        "mlp.w2.weight",
        "mlp.w3.weight",
    )
    assert [layers[-2].neox_names, layers[-1].neox_names] == [("norm.scale",), ("final_linear.weight",)]
    assert {layers[2].meta_name(t): layers[2].huggingface_name(t) for t in layers[2].tensors} == {
        "layers.1.attention_norm.weight": "model.layers.1.input_layernorm.weight",
        "layers.1.attention.wq.weight": "model.layers.1.self_attn.q_proj.weight",
        "layers.1.attention.wk.weight": "model.layers.1.self_attn.k_proj.weight",
        "layers.1.attention.wv.weight": "model.layers.1.self_attn.v_proj.weight",
        "layers.1.attention.wo.weight": "model.layers.1.self_attn.o_proj.weight",
        "layers.1.ffn_norm.weight": "model.layers.1.post_attention_layernorm.weight",
        "layers.1.feed_forward.w1.weight": "model.layers.1.mlp.gate_proj.weight",
        "layers.1.feed_forward.w2.weight": "model.layers.1.mlp.down_proj.weight",
        "layers.1.feed_forward.w3.weight": "model.layers.1.mlp.up_proj.weight",
    }


def test_huggingface_differs_from_meta_by_names_and_rope_rows(model_of: Callable[..., ModelConfig]) -> None:
    model = model_of()
    layer = list(iterate_layers(2))[1]
    meta = {layer.meta_name(t): torch.randn(t.shape(model)).bfloat16() for t in layer.tensors}
    neox = to_neox(layer, meta.__getitem__, model)
    huggingface = to_huggingface(layer, neox, model)
    for tensor in layer.tensors:
        original, exported = meta[layer.meta_name(tensor)], huggingface[layer.huggingface_name(tensor)]
        if tensor.meta.endswith(("wq.weight", "wk.weight")):
            heads = original.shape[0] // model.head_dim
            original = original.view(heads, model.head_dim // 2, 2, -1).transpose(1, 2).reshape(original.shape)
        assert torch.equal(exported, original)
    assert all(torch.equal(weight, meta[name]) for name, weight in to_meta(layer, neox, model).items())


def test_replicated_tensors_must_agree() -> None:
    ranks = [{"norm.scale": torch.ones(4)}, {"norm.scale": torch.tensor([1.0, 1, 1, 2])}]
    with pytest.raises(CheckpointError, match=r"origin: norm\.scale must be the same .* shard 1 differs"):
        join(ranks, "origin")
    assert torch.equal(concatenate([torch.ones(4)] * 2, None, "norm"), torch.ones(4))


def test_weights_of_another_shape_are_refused(model_of: Callable[..., ModelConfig]) -> None:
    layer = list(iterate_layers(2))[-1]
    with pytest.raises(CheckpointError, match=r"layer 6: final_linear\.weight has shape \(3, 64\).* needs \(128, 64\)"):
        to_huggingface(layer, {"final_linear.weight": torch.zeros(3, 64)}, model_of())
    with pytest.raises(CheckpointError, match=r"final_linear\.weight has shape None"):
        to_huggingface(layer, {"norm.scale": torch.zeros(64)}, model_of())
