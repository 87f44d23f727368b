from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from neox_core.checkpoint.conversion import proof
from neox_core.checkpoint.conversion.convert import convert
from neox_core.checkpoint.conversion.proof import logits_from_shards, prove_conversion, sample_ids
from neox_core.checkpoint.formats.neox import NeoxCheckpoint
from neox_core.config import ModelConfig, ParallelConfig
from neox_core.errors import CheckpointError

WriteBase = Callable[..., Any]
Change = Callable[[dict[str, Tensor]], object]
HEAD_DIM = 8


@pytest.mark.parametrize(
    ("kv_heads", "tensor", "pipeline"), [(8, 1, 1), (8, 4, 2), (4, 1, 2), (4, 2, 1), (4, 4, 1), (4, 8, 2), (2, 8, 1)]
)
def test_logits_equal_transformers(
    write_base: WriteBase,
    model_of: Callable[..., ModelConfig],
    tmp_path: Path,
    kv_heads: int,
    tensor: int,
    pipeline: int,
) -> None:
    base = write_base(model_of(num_kv_heads=kv_heads))
    convert(base.folder, tmp_path / "neox", base.model, ParallelConfig(tensor=tensor, pipeline=pipeline))
    summary = prove_conversion(base.folder, NeoxCheckpoint(tmp_path / "neox"), base.model)
    assert summary["tokens"] == 2 * 96
    assert summary["tolerance"] == 1e-4
    # Far below the tolerance: what fp32 sums in another order may differ by.
    assert summary["largest_logit_difference"] < 1e-5
    assert summary["largest_layer_difference"] < 2e-6
    logits = logits_from_shards(NeoxCheckpoint(tmp_path / "neox"), base.model, sample_ids(128))
    assert logits.std() > 0.1


def test_the_sources_rope_base_is_used(write_base: WriteBase, tmp_path: Path) -> None:
    base = write_base(rope_theta=20000.0)
    contracted = base.model.model_copy(update={"rope_theta": 500.0})
    convert(base.folder, tmp_path / "neox", contracted, ParallelConfig(), base_rope_theta=20000.0)
    summary = prove_conversion(base.folder, NeoxCheckpoint(tmp_path / "neox"), contracted)
    assert summary["largest_logit_difference"] < 1e-5


@pytest.fixture
def tampered(write_base: WriteBase, tmp_path: Path) -> Callable[..., tuple[Any, NeoxCheckpoint]]:
    """Converts, then changes the files of some layers and ranks."""

    def make(change: Change, indices: tuple[int, ...] = (2, 3), ranks: tuple[int, ...] = (0, 1)) -> Any:
        base = write_base()
        convert(base.folder, tmp_path / "neox", base.model, ParallelConfig(tensor=2, pipeline=2))
        for index in indices:
            for rank in ranks:
                path = tmp_path / "neox/global_step0" / f"layer_{index:02d}-model_{rank:02d}-model_states.pt"
                content = torch.load(path, weights_only=True)
                change(content)
                torch.save(content, path)
        return base, NeoxCheckpoint(tmp_path / "neox")

    return make


@pytest.fixture(params=[True, False], ids=["whole model", "layer by layer"])
def whole(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the whole model's logits are compared, or, as with large models, each layer alone."""
    if not request.param:
        monkeypatch.setattr(proof, "SMALL_MODEL", 0)
    return bool(request.param)


def keys_split_like_queries(heads: Tensor) -> Tensor:
    """Each query head gets its k rows as if there were as many KV heads: the first rows of every head first."""
    k = heads[:, HEAD_DIM : HEAD_DIM * 3 // 2]
    rows = k.reshape(-1, HEAD_DIM, k.shape[2]).transpose(0, 1)
    heads[:, HEAD_DIM : HEAD_DIM * 3 // 2] = rows.reshape(k.shape)
    return heads


def on_qkv(change: Callable[[Tensor], Tensor]) -> Change:
    """A change of a rank's fused tensor, seen as [heads, q 8 + k 4 + v 4 rows, columns]."""

    def apply(content: dict[str, Tensor]) -> None:
        name = "attention.query_key_value.weight"
        fused = content[name]
        content[name] = change(fused.view(-1, 2 * HEAD_DIM, fused.shape[1]).clone()).reshape(fused.shape)

    return apply


def unpermuted_rope(heads: Tensor) -> Tensor:
    """q and k rows as Meta has them; v stays."""
    q = heads[:, :HEAD_DIM]
    heads[:, :HEAD_DIM] = q.reshape(-1, 2, HEAD_DIM // 2, q.shape[2]).transpose(1, 2).reshape(q.shape)
    k = heads[:, HEAD_DIM : HEAD_DIM * 3 // 2].reshape(-1, HEAD_DIM, q.shape[2])
    k = k.reshape(-1, 2, HEAD_DIM // 2, q.shape[2]).transpose(1, 2)
    heads[:, HEAD_DIM : HEAD_DIM * 3 // 2] = k.reshape(-1, HEAD_DIM // 2, q.shape[2])
    return heads


def key_heads_in_another_order(heads: Tensor) -> Tensor:
    """The rank's two KV heads exchanged: every shape stays right."""
    heads[:, HEAD_DIM : HEAD_DIM * 3 // 2] = heads[:, HEAD_DIM : HEAD_DIM * 3 // 2].roll(2, dims=0)
    return heads


def key_and_value_swapped(heads: Tensor) -> Tensor:
    q, k, v = heads.split([HEAD_DIM, HEAD_DIM // 2, HEAD_DIM // 2], dim=1)
    return torch.cat([q, v, k], dim=1)


def query_heads_in_another_order(heads: Tensor) -> Tensor:
    heads[:, :HEAD_DIM] = heads[:, :HEAD_DIM].roll(1, dims=0)
    return heads


def swap(first: str, second: str) -> Change:
    def apply(content: dict[str, Tensor]) -> None:
        content[first], content[second] = content[second], content[first]

    return apply


@pytest.mark.parametrize(
    "change",
    [
        on_qkv(unpermuted_rope),
        on_qkv(key_heads_in_another_order),
        on_qkv(key_and_value_swapped),
        on_qkv(keys_split_like_queries),
        on_qkv(query_heads_in_another_order),
        swap("mlp.w1.weight", "mlp.w3.weight"),
        swap("input_layernorm.scale", "post_attention_layernorm.scale"),
    ],
    ids=[
        "unpermuted RoPE",
        "KV heads exchanged",
        "k and v swapped",
        "k split like q",
        "query heads shifted",
        "w1 and w3",
        "norms",
    ],
)
def test_wrong_conversions_are_caught(tampered: Callable[..., Any], whole: bool, change: Change) -> None:
    base, shards = tampered(change)
    message = r"logits of the shards in .* differ by .*, more than 0\.0001"
    message = message if whole else r"layer [01] (attention|mlp) of the shards .* of its largest value, more than 1e-05"
    with pytest.raises(CheckpointError, match=message):
        prove_conversion(base.folder, shards, base.model)


@pytest.mark.parametrize("index", [0, 2, 3, 6])
def test_one_shard_twice_is_caught(tampered: Callable[..., Any], whole: bool, index: int) -> None:
    seen: dict[str, Tensor] = {}

    def repeat_first(content: dict[str, Tensor]) -> None:
        if seen:
            content.update(seen)
        seen.update(content)

    base, shards = tampered(repeat_first, indices=(index,))
    with pytest.raises(CheckpointError, match=r"differs? by"):
        prove_conversion(base.folder, shards, base.model)


def test_a_wrong_norm_on_one_rank_is_caught(tampered: Callable[..., Any], whole: bool) -> None:
    base, shards = tampered(lambda content: content["input_layernorm.scale"].mul_(1.5), indices=(3,), ranks=(1,))
    with pytest.raises(CheckpointError, match=r"differs? by"):
        prove_conversion(base.folder, shards, base.model)


def test_nan_is_caught(tampered: Callable[..., Any], whole: bool) -> None:
    base, shards = tampered(lambda content: content["mlp.w2.weight"][0].fill_(float("nan")), indices=(3,), ranks=(0,))
    with pytest.raises(CheckpointError, match=r"differs? by inf"):
        prove_conversion(base.folder, shards, base.model)


def test_another_models_shards_are_refused(tampered: Callable[..., Any]) -> None:
    base, shards = tampered(lambda content: content.pop("mlp.w2.weight"), indices=(3,), ranks=(0,))
    with pytest.raises(CheckpointError, match=r"layer 3 of rank 0 does not fit: .*mlp\.w2\.weight"):
        prove_conversion(base.folder, shards, base.model)
