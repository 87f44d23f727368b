from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from neox_core.checkpoint.conversion import toy_base
from neox_core.checkpoint.conversion.toy_base import make_random_base
from neox_core.checkpoint.formats.meta import MetaCheckpoint
from neox_core.config import ModelConfig, load_config
from neox_core.errors import ConfigError
from neox_core.storage.tensor_writer import StreamedTensor
from tests.paths import CONFIGS

ModelOf = Callable[..., ModelConfig]


def test_the_demo_model(tmp_path: Path) -> None:
    model = load_config(CONFIGS / "toy.yml").model
    make_random_base(model, tmp_path, seed=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "consolidated.00.pth",
        "consolidated.01.pth",
        "params.json",
    ]
    meta = MetaCheckpoint(tmp_path)
    assert meta.model == model
    for name, std in (("tok_embeddings.weight", 0.02), ("layers.3.feed_forward.w1.weight", 0.02)):
        assert meta.tensor(name).float().std() == pytest.approx(std, rel=0.02)
    for name in ("layers.3.attention.wo.weight", "layers.0.feed_forward.w2.weight"):
        assert meta.tensor(name).float().std() == pytest.approx(0.02 / math.sqrt(8), rel=0.02)
    assert torch.equal(meta.tensor("norm.weight"), torch.ones(256, dtype=torch.bfloat16))


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_weights_depend_on_the_seed_alone(tmp_path: Path, model_of: ModelOf, kv_heads: int) -> None:
    model = model_of(num_kv_heads=kv_heads)
    for name, seed, shards in (("a", 5, 1), ("b", 5, 4), ("c", 6, 1)):
        make_random_base(model, tmp_path / name, seed, shards)
    a, b, c = (MetaCheckpoint(tmp_path / name) for name in "abc")
    assert (a.num_shards, b.num_shards) == (1, kv_heads)
    for name in ("layers.1.attention.wk.weight", "layers.0.feed_forward.w2.weight", "tok_embeddings.weight"):
        assert torch.equal(a.tensor(name), b.tensor(name))
        assert not torch.equal(a.tensor(name), c.tensor(name))


@pytest.mark.parametrize("size", [2, 96, 168, 170, 192, 256, 300, 1022])
def test_any_intermediate_size_is_kept(tmp_path: Path, model_of: ModelOf, size: int) -> None:
    model = model_of(intermediate_size=size)
    make_random_base(model, tmp_path, seed=1)
    assert MetaCheckpoint(tmp_path).model == model


def test_shards_that_do_not_divide(tmp_path: Path, model_of: ModelOf) -> None:
    with pytest.raises(ConfigError, match=r"shards 3 does not divide model\.num_attention_heads 8"):
        make_random_base(model_of(), tmp_path / "base", seed=1, shards=3)
    assert not (tmp_path / "base").exists()


@pytest.mark.parametrize(
    "odd",
    [{"num_attention_heads": 3, "num_kv_heads": 3, "hidden_size": 48}, {"intermediate_size": 33}, {"vocab_size": 129}],
)
def test_one_shard_where_two_do_not_divide(tmp_path: Path, model_of: ModelOf, odd: dict[str, int]) -> None:
    model = model_of(**odd)
    make_random_base(model, tmp_path, seed=1)
    meta = MetaCheckpoint(tmp_path)
    assert (meta.num_shards, meta.model) == (1, model)


def test_nothing_is_written_of_a_model_that_is_none_of_metas(tmp_path: Path, model_of: ModelOf) -> None:
    with pytest.raises(ConfigError, match="not qwen2 with heads of 8: export to Hugging Face's format"):
        make_random_base(model_of(family="qwen2"), tmp_path / "base", seed=1)
    assert not (tmp_path / "base").exists()


def test_no_params_before_all_shards(tmp_path: Path, model_of: ModelOf, monkeypatch: pytest.MonkeyPatch) -> None:
    save = toy_base._save

    def failing(tensors: list[StreamedTensor], path: Path) -> None:
        save(tensors, path)
        if "consolidated.01" in path.name:
            raise OSError("disk full")

    monkeypatch.setattr(toy_base, "_save", failing)
    with pytest.raises(OSError, match="disk full"):
        make_random_base(model_of(), tmp_path, seed=1)
    assert [path.name for path in tmp_path.iterdir()] == ["consolidated.00.pth"]


def test_params_have_metas_names(tmp_path: Path, model_of: ModelOf) -> None:
    make_random_base(model_of(num_kv_heads=2, num_attention_heads=4), tmp_path, seed=1)
    params = json.loads((tmp_path / "params.json").read_text())
    assert params | {"multiple_of": 0} == {
        "dim": 64,
        "n_layers": 2,
        "n_heads": 4,
        "n_kv_heads": 2,
        "multiple_of": 0,
        "norm_eps": 1e-5,
        "rope_theta": 1e6,
        "vocab_size": 128,
    }
