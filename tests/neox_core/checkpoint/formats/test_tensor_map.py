from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from neox_core.checkpoint.formats.tensor_map import (
    QKV,
    Form,
    StoredLayout,
    check_divides,
    iterate_layers,
    stored_tensors,
)
from neox_core.config import ModelConfig
from neox_core.errors import ConfigError

HEAD_DIM, HEADS, HIDDEN = 8, 8, 64
ModelOf = Callable[..., ModelConfig]


def numbered(rows: int, start: int) -> Tensor:
    """A matrix whose values name their place."""
    return torch.arange(start, start + rows * HIDDEN).reshape(rows, HIDDEN)


def assembled(layout: StoredLayout, wholes: dict[str, Tensor]) -> Tensor:
    """A file's tensor, put together value by value as its blocks say."""
    out = torch.full((layout.shape[0] if len(layout.shape) > 1 else 1, layout.shape[-1]), -1)
    for block in layout.blocks:
        for row, at in zip(block.rows, block.at_rows, strict=True):
            assert (out[at, block.at_columns] == -1).all(), "written twice"
            out[at, block.at_columns] = wholes[block.whole][row, block.columns]
    assert (out >= 0).all(), "not filled"
    return out


def slow_fused(q: Tensor, k: Tensor, v: Tensor, kv_heads: int, ranks: int, rank: int) -> Tensor:
    """Row by row from the description: per query head its q, then the next slices of the rank's k and of its v."""
    local_q = [q[row] for row in range(q.shape[0]) if row // HEAD_DIM // (HEADS // ranks) == rank]
    # The KV heads that the rank's query heads use: query head h uses KV head h·kv_heads // heads.
    used = {head * kv_heads // HEADS for head in range(HEADS) if head // (HEADS // ranks) == rank}
    local_k = [k[row] for row in range(k.shape[0]) if row // HEAD_DIM in used]
    local_v = [v[row] for row in range(v.shape[0]) if row // HEAD_DIM in used]
    share = HEAD_DIM * len(used) // (HEADS // ranks)
    rows: list[Tensor] = []
    for _ in range(HEADS // ranks):
        rows += [local_q.pop(0) for _ in range(HEAD_DIM)]
        rows += [local_k.pop(0) for _ in range(share)]
        rows += [local_v.pop(0) for _ in range(share)]
    assert not local_q
    assert not local_k
    assert not local_v
    return torch.stack(rows)


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("kv_heads", [8, 4, 2])
def test_fused_qkv_is_as_described(model_of: ModelOf, kv_heads: int, ranks: int) -> None:
    model = model_of(num_kv_heads=kv_heads)
    layer = list(iterate_layers(model))[1]
    prefix = "model.layers.0.self_attn."
    q, k, v = numbered(64, 0), numbered(kv_heads * HEAD_DIM, 10_000), numbered(kv_heads * HEAD_DIM, 20_000)
    wholes = {f"{prefix}{name}_proj.weight": part for name, part in zip("qkv", (q, k, v), strict=True)}
    for rank in range(ranks):
        layout = next(t for t in stored_tensors(layer, model, Form.NEOX, ranks, rank) if t.name == QKV)
        expected = slow_fused(q, k, v, kv_heads, ranks, rank)
        assert layout.shape == tuple(expected.shape)
        assert torch.equal(assembled(layout, wholes), expected)


@pytest.mark.parametrize(("shards", "shard"), [(1, 0), (2, 1)])
def test_rope_rows_of_meta_are_pairs(model_of: ModelOf, shards: int, shard: int) -> None:
    layer = list(iterate_layers(model_of()))[1]
    halves = numbered(64, 0)
    layout = stored_tensors(layer, model_of(), Form.META, shards, shard)[1]
    assert layout.name == "layers.0.attention.wq.weight"
    interleaved = assembled(layout, {"model.layers.0.self_attn.q_proj.weight": halves})
    first = shard * len(interleaved)
    for row in range(len(interleaved)):
        head, place = divmod(first + row, HEAD_DIM)
        pair, second = divmod(place, 2)
        assert torch.equal(interleaved[row], halves[head * HEAD_DIM + second * HEAD_DIM // 2 + pair])


@pytest.mark.parametrize(
    ("form", "parts"),
    [(Form.META, 1), (Form.META, 4), (Form.NEOX, 1), (Form.NEOX, 2), (Form.NEOX, 8), (Form.HUGGINGFACE, 1)],
)
def test_files_hold_every_value_of_the_model(model_of: ModelOf, form: Form, parts: int) -> None:
    model = model_of(num_kv_heads=2)
    for layer in iterate_layers(model):
        wholes = {
            layer.name(t, Form.HUGGINGFACE): torch.arange(torch.Size(t.shape(model)).numel()).view(
                -1, t.shape(model)[-1]
            )
            for t in layer.tensors
        }
        counts = {name: torch.zeros_like(whole) for name, whole in wholes.items()}
        for part in range(parts):
            for layout in stored_tensors(layer, model, form, parts, part):
                assembled(layout, wholes)
                for block in layout.blocks:
                    if block.replica == 0:
                        counts[block.whole][block.rows.start : block.rows.stop, block.columns] += 1
        assert all((count == 1).all() for count in counts.values())


def test_layers_and_names(model_of: ModelOf) -> None:
    layers = list(iterate_layers(model_of()))
    assert [layer.index for layer in layers] == [0, 2, 3, 5, 6]
    assert [layers[0].name(t, Form.NEOX) for t in layers[0].tensors] == ["word_embeddings.weight"]
    assert list(dict.fromkeys(layers[1].name(t, Form.NEOX) for t in layers[1].tensors)) == [
        "input_layernorm.scale",
        "attention.query_key_value.weight",
        "attention.dense.weight",
        "post_attention_layernorm.scale",
        "mlp.w1.weight",
        "mlp.w2.weight",
        "mlp.w3.weight",
    ]
    assert [layer.name(layer.tensors[0], Form.NEOX) for layer in layers[-2:]] == ["norm.scale", "final_linear.weight"]
    assert {layers[2].name(t, Form.META): layers[2].name(t, Form.HUGGINGFACE) for t in layers[2].tensors} == {
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


@pytest.mark.parametrize(
    ("change", "parts", "message"),
    [
        ({}, 3, "parallel.tensor 3 does not divide model.num_attention_heads 8"),
        ({"intermediate_size": 190}, 4, "parallel.tensor 4 does not divide model.intermediate_size 190"),
        ({"vocab_size": 126}, 4, "parallel.tensor 4 does not divide model.vocab_size 126"),
        (
            {"num_attention_heads": 12, "num_kv_heads": 6, "hidden_size": 192},
            4,
            "parallel.tensor 4 does not divide model.num_kv_heads 6 of 12 heads and is no multiple",
        ),
    ],
)
def test_cuts_that_do_not_divide(model_of: ModelOf, change: dict[str, int], parts: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_divides(model_of(**change), parts, "parallel.tensor")
