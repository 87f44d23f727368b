from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from neox_core.checkpoint.conversion.convert import convert
from neox_core.checkpoint.formats.neox import NeoxCheckpoint
from neox_core.config import ModelConfig, ParallelConfig
from neox_core.errors import CheckpointError

ModelOf = Callable[..., ModelConfig]


@pytest.fixture
def converted(write_base: Callable[..., Any], tmp_path: Path) -> Callable[[int], Path]:
    """Converts the tiny base for two tensor-parallel ranks and a number of pipeline stages."""

    def make(pipeline: int) -> Path:
        base = write_base()
        convert(base.folder, tmp_path / "neox", base.model, ParallelConfig(tensor=2, pipeline=pipeline))
        return tmp_path / "neox"

    return make


def test_a_training_checkpoints_further_files_are_ignored(converted: Callable[[int], Path]) -> None:
    folder = converted(2) / "global_step0"
    step = folder.rename(folder.parent / "global_step25")
    for name in ("mp_rank_00_model_states.pt", "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt", "rng_rank_0.pt"):
        (step / name).write_bytes(b"not opened")
    # DeepSpeed may write empty files for layers without weights.
    torch.save({}, step / "layer_01-model_00-model_states.pt")
    checkpoint = NeoxCheckpoint(step)
    assert checkpoint.tensor_parallel == 2
    assert set(checkpoint.layer(5, 1)) == {"norm.scale"}
    with pytest.raises(CheckpointError, match="has no layer 1 for tensor-parallel rank 0"):
        checkpoint.layer(1, 0)
    (step.parent / "latest").write_text("global_step25\n")
    assert str(NeoxCheckpoint(step.parent).folder) == str(step)


@pytest.mark.parametrize("pipeline", [1, 2])
def test_tensors_are_read_from_disk_when_used(converted: Callable[[int], Path], pipeline: int) -> None:
    tensor = NeoxCheckpoint(converted(pipeline)).layer(0, 0)["word_embeddings.weight"]
    mapped = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    ranges = [[int(bound, 16) for bound in fields[0].split("-")] for fields in mapped if fields[-1].endswith(".pt")]
    assert any(low <= tensor.data_ptr() < high for low, high in ranges)


@pytest.mark.parametrize("pipeline", [1, 2])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_shards_are_cut_anew(
    write_base: Callable[..., Any], converted: Callable[[int], Path], tmp_path: Path, pipeline: int, ranks: int
) -> None:
    """As a conversion for that number of ranks has them."""
    base = write_base()
    convert(base.folder, tmp_path / "other", base.model, ParallelConfig(tensor=ranks))
    expected, made = NeoxCheckpoint(tmp_path / "other"), NeoxCheckpoint(converted(pipeline)).layer_of(base.model, ranks)
    for index in (0, *range(2, base.model.num_layers + 2), base.model.num_layers + 3, base.model.num_layers + 4):
        for rank in range(ranks):
            found, wanted = made(index, rank), expected.layer(index, rank)
            assert found.keys() == wanted.keys()
            assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_missing_files_are_named(converted: Callable[[int], Path], model_of: ModelOf, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="absent does not exist"):
        NeoxCheckpoint(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="holds neither latest nor files of a checkpoint"):
        NeoxCheckpoint(tmp_path)
    target = converted(2)
    (target / "global_step0" / "layer_03-model_01-model_states.pt").unlink()
    with pytest.raises(CheckpointError, match=r"layer_03-model_01-model_states\.pt does not exist"):
        NeoxCheckpoint(target).weights(model_of())
    (target / "latest").write_text("global_step7")
    with pytest.raises(CheckpointError, match=r"latest names global_step7, but .* does not exist"):
        NeoxCheckpoint(target)
    (target / "global_step7").mkdir()
    with pytest.raises(CheckpointError, match=r"holds neither layer_00-model_00-model_states\.pt nor mp_rank_00"):
        NeoxCheckpoint(target)


def test_a_missing_rank_is_named(converted: Callable[[int], Path]) -> None:
    target = converted(1)
    (target / "global_step0" / "mp_rank_00_model_states.pt").unlink()
    with pytest.raises(CheckpointError, match=r"lacks mp_rank_00_model_states\.pt of 2 ranks"):
        NeoxCheckpoint(target)


def test_wrong_contents(converted: Callable[[int], Path], model_of: ModelOf) -> None:
    target = converted(2)
    path = target / "global_step0" / "layer_05-model_01-model_states.pt"
    original = torch.load(path, weights_only=True)
    torch.save({"norm.scale": original["norm.scale"] * 2}, path)
    with pytest.raises(CheckpointError, match=r"norm\.scale must be the same in every shard, but shard 1 differs"):
        NeoxCheckpoint(target).weights(model_of()).tensor("model.norm.weight")
    torch.save({"norm.bias": original["norm.scale"]}, path)
    with pytest.raises(CheckpointError, match=r"layer 5: norm\.scale is missing"):
        NeoxCheckpoint(target).weights(model_of())
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"layer_05-model_01-model_states\.pt \(100 bytes\) is damaged"):
        NeoxCheckpoint(target).weights(model_of())
    with pytest.raises(CheckpointError, match="has 2 tensor-parallel ranks, no 2"):
        NeoxCheckpoint(target).layer(5, 2)


def test_a_rank_file_without_weights(converted: Callable[[int], Path], model_of: ModelOf) -> None:
    target = converted(1)
    torch.save({"module": {}}, target / "global_step0" / "mp_rank_01_model_states.pt")
    with pytest.raises(CheckpointError, match=r"mp_rank_01_model_states\.pt holds no weights under 'module'"):
        NeoxCheckpoint(target).weights(model_of())
