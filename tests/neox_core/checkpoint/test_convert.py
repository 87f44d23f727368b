from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from neox_core.checkpoint.convert import convert
from neox_core.checkpoint.layout import iterate_layers, to_huggingface, to_meta
from neox_core.checkpoint.neox import NeoxCheckpoint
from neox_core.checkpoint.reference import llama_from_meta
from neox_core.config import ModelConfig, ParallelConfig
from neox_core.errors import CheckpointError, ConfigError

WriteBase = Callable[..., Any]
ModelOf = Callable[..., ModelConfig]


@pytest.mark.parametrize("pipeline", [1, 2])
@pytest.mark.parametrize("tensor", [1, 2, 4])
@pytest.mark.parametrize("kv_heads", [8, 4], ids=["MHA", "GQA"])
def test_round_trip_is_bit_identical(
    write_base: WriteBase, model_of: ModelOf, tmp_path: Path, kv_heads: int, tensor: int, pipeline: int
) -> None:
    model = model_of(num_kv_heads=kv_heads)
    base = write_base(model)
    convert(base.folder, tmp_path / "neox", model, ParallelConfig(tensor=tensor, pipeline=pipeline))
    checkpoint = NeoxCheckpoint(tmp_path / "neox")
    assert checkpoint.tensor_parallel == tensor
    meta: dict[str, torch.Tensor] = {}
    huggingface: dict[str, torch.Tensor] = {}
    for layer in iterate_layers(model.num_layers):
        whole = checkpoint.full_layer(layer.index)
        meta |= to_meta(layer, whole, model)
        huggingface |= to_huggingface(layer, whole, model)
    assert meta.keys() == base.weights.keys()
    for name, weight in meta.items():
        assert weight.dtype == torch.bfloat16
        assert torch.equal(weight, base.weights[name]), name
    # What transformers' own way of reading Meta's files gives.
    reference = llama_from_meta(base.folder, model, 8).state_dict()
    assert huggingface.keys() == reference.keys()
    assert all(torch.equal(weight.float(), reference[name]) for name, weight in huggingface.items())


def test_files_without_pipeline(write_base: WriteBase, tmp_path: Path) -> None:
    base = write_base()
    convert(base.folder, tmp_path / "neox", base.model, ParallelConfig(tensor=2))
    folder = tmp_path / "neox" / "global_step0"
    assert (tmp_path / "neox" / "latest").read_text() == "global_step0"
    files = sorted(path.name for path in folder.iterdir())
    assert files == ["mp_rank_00_model_states.pt", "mp_rank_01_model_states.pt"]
    module = torch.load(folder / files[1], weights_only=True)["module"]
    assert torch.equal(module["sequential.0.word_embeddings.weight"], base.weights["tok_embeddings.weight"][64:])
    assert torch.equal(
        module["sequential.2.attention.dense.weight"], base.weights["layers.0.attention.wo.weight"][:, 32:]
    )
    assert torch.equal(module["sequential.3.mlp.w1.weight"], base.weights["layers.1.feed_forward.w1.weight"][96:])
    assert torch.equal(module["sequential.3.mlp.w2.weight"], base.weights["layers.1.feed_forward.w2.weight"][:, 96:])
    assert torch.equal(module["sequential.3.mlp.w3.weight"], base.weights["layers.1.feed_forward.w3.weight"][96:])
    assert torch.equal(module["sequential.5.norm.scale"], base.weights["norm.weight"])
    assert torch.equal(module["sequential.6.final_linear.weight"], base.weights["output.weight"][64:])
    assert len(module) == 3 + 2 * 7


def test_files_with_pipeline(write_base: WriteBase, tmp_path: Path) -> None:
    base = write_base()
    convert(base.folder, tmp_path / "neox", base.model, ParallelConfig(tensor=2, pipeline=2))
    folder = tmp_path / "neox" / "global_step0"
    assert sorted(path.name for path in folder.iterdir()) == [
        f"layer_{index:02d}-model_{rank:02d}-model_states.pt" for index in (0, 2, 3, 5, 6) for rank in (0, 1)
    ]
    content = torch.load(folder / "layer_03-model_01-model_states.pt", weights_only=True)
    assert torch.equal(content["mlp.w1.weight"], base.weights["layers.1.feed_forward.w1.weight"][96:])


@pytest.mark.parametrize("pipeline", [1, 2])
def test_files_hold_no_more_than_their_part(write_base: WriteBase, tmp_path: Path, pipeline: int) -> None:
    base = write_base()
    convert(base.folder, tmp_path / "neox", base.model, ParallelConfig(tensor=4, pipeline=pipeline))
    whole = sum(path.stat().st_size for path in base.folder.glob("*.pth"))
    written = sum(path.stat().st_size for path in (tmp_path / "neox").rglob("*.pt"))
    # Per tensor and file there is up to 1 kB of headers; a slice saved with its whole storage would make it fourfold.
    assert written < whole + 4 * 17 * 1024 + 20_000


def test_every_differing_field_is_named(write_base: WriteBase, tmp_path: Path) -> None:
    base = write_base()
    other = base.model.model_copy(update={"num_layers": 3, "rope_theta": 10000.0, "vocab_size": 256})
    message = r"num_layers 3 \(source: 2\); vocab_size 256 \(source: 128\); rope_theta 10000\.0 \(source: 1000000\.0\)"
    with pytest.raises(ConfigError, match=message):
        convert(base.folder, tmp_path / "neox", other, ParallelConfig())
    assert not (tmp_path / "neox").exists()


def test_rope_base_is_changed_only_on_purpose(write_base: WriteBase, tmp_path: Path) -> None:
    base = write_base()
    contracted = base.model.model_copy(update={"rope_theta": 10000.0})
    convert(base.folder, tmp_path / "neox", contracted, ParallelConfig(), base_rope_theta=1e6)
    assert NeoxCheckpoint(tmp_path / "neox").tensor_parallel == 1
    with pytest.raises(ConfigError, match=r"rope_theta 500000\.0 \(source: 1000000\.0\)"):
        convert(base.folder, tmp_path / "neox", contracted, ParallelConfig(), base_rope_theta=5e5)


def test_tensor_parallel_that_does_not_divide(write_base: WriteBase, tmp_path: Path) -> None:
    base = write_base()
    with pytest.raises(ConfigError, match=r"parallel\.tensor 8 does not divide model\.num_kv_heads 4"):
        convert(base.folder, tmp_path / "neox", base.model, ParallelConfig(tensor=8))


@pytest.mark.parametrize("pipeline", [1, 2])
def test_an_earlier_attempt_is_replaced(write_base: WriteBase, tmp_path: Path, pipeline: int) -> None:
    base = write_base()
    target = tmp_path / "neox"
    convert(base.folder, target, base.model, ParallelConfig(tensor=4, pipeline=pipeline))
    convert(base.folder, target, base.model, ParallelConfig(tensor=2, pipeline=3 - pipeline))
    assert NeoxCheckpoint(target).tensor_parallel == 2
    form = "mp_rank" if pipeline == 2 else "layer_"
    assert all(path.name.startswith(form) for path in (target / "global_step0").iterdir())


@pytest.mark.parametrize("pipeline", [1, 2])
def test_an_interrupted_conversion_has_no_latest(write_base: WriteBase, tmp_path: Path, pipeline: int) -> None:
    base = write_base()
    target = tmp_path / "neox"
    convert(base.folder, target, base.model, ParallelConfig(tensor=2, pipeline=pipeline))

    def stop(share: float, text: str) -> None:
        if share > 0.5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(base.folder, target, base.model, ParallelConfig(tensor=2, pipeline=pipeline), stop)
    assert not (target / "latest").exists()
    assert not list((target / "global_step0").glob("*.tmp"))


def test_progress_rises_to_one(write_base: WriteBase, tmp_path: Path) -> None:
    base = write_base()
    for pipeline in (1, 2):
        shares: list[float] = []
        parallel = ParallelConfig(tensor=2, pipeline=pipeline)
        convert(base.folder, tmp_path / "neox", base.model, parallel, lambda share, _, seen=shares: seen.append(share))
        assert shares == sorted(shares)
        assert shares[-1] == 1.0
        assert len(shares) >= 5


def test_a_damaged_source_yields_nothing(write_base: WriteBase, tmp_path: Path) -> None:
    base = write_base()
    (base.folder / "consolidated.00.pth").unlink()
    with pytest.raises(CheckpointError, match=r"lacks consolidated\.00\.pth"):
        convert(base.folder, tmp_path / "neox", base.model, ParallelConfig())
    assert not (tmp_path / "neox").exists()
