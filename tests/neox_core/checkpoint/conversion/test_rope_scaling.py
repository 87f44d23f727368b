"""Models that were extended to longer sequences: read, converted, proven and exported with their scaling."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from neox_core.checkpoint.conversion.convert import convert, open_source
from neox_core.checkpoint.conversion.export import export_huggingface, export_meta
from neox_core.checkpoint.conversion.proof import logits_from_shards, prove, prove_conversion, sample_ids
from neox_core.checkpoint.formats.huggingface_config import config_files
from neox_core.checkpoint.formats.meta import MetaCheckpoint
from neox_core.checkpoint.formats.neox import NeoxCheckpoint
from neox_core.config import ModelConfig, ParallelConfig, RopeScalingConfig
from neox_core.errors import CheckpointError, ConfigError

LINEAR = RopeScalingConfig(rope_type="linear", factor=4)
# 96 positions at head width 8 reach all three of llama3's bands.
LLAMA3 = RopeScalingConfig(
    rope_type="llama3", factor=8, low_freq_factor=1, high_freq_factor=4, original_max_position_embeddings=64
)


@pytest.mark.parametrize("scaling", [LINEAR, LLAMA3], ids=lambda scaling: scaling.rope_type)
@pytest.mark.parametrize("old", [False, True], ids=["transformers 5", "before 5"])
def test_logits_equal_transformers(
    write_base: Callable[..., Any], tmp_path: Path, scaling: RopeScalingConfig, old: bool
) -> None:
    base, folder = write_base(), tmp_path / "hf"
    convert(base.folder, tmp_path / "neox", base.model, ParallelConfig())
    scaled = base.model.model_copy(update={"rope_scaling": scaling})
    export_huggingface(tmp_path / "neox", folder, scaled, None, 512)
    if old:
        config = json.loads((folder / "config.json").read_text())
        del config["rope_parameters"]
        config["rope_scaling"]["type"] = config["rope_scaling"].pop("rope_type")
        (folder / "config.json").write_text(json.dumps(config))
    assert open_source(folder).model == scaled
    convert(folder, tmp_path / "again", scaled, ParallelConfig(tensor=2))
    shards = NeoxCheckpoint(tmp_path / "again")
    assert prove_conversion(folder, shards, scaled)["largest_logit_difference"] < 1e-5
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = sample_ids(128)
    with torch.inference_mode():
        expected = theirs(input_ids=ids).logits
        torch.testing.assert_close(logits_from_shards(shards, scaled, ids), expected, rtol=0, atol=1e-5)
    with pytest.raises(CheckpointError, match=r"differ by"):
        prove(shards, folder, base.model)
    with pytest.raises(ConfigError, match=r"rope_scaling None \(source: rope_type="):
        convert(folder, tmp_path / "other", base.model, ParallelConfig())


def test_metas_format_with_llama_3_scaling(
    write_base: Callable[..., Any], model_of: Callable[..., ModelConfig], tmp_path: Path
) -> None:
    scaling = LLAMA3.model_copy(update={"original_max_position_embeddings": 8192, "factor": 32.0})
    base = write_base(use_scaled_rope=True, rope_scaling_factor=32.0)
    model = MetaCheckpoint(base.folder).model
    assert model == model_of(rope_scaling=scaling)
    convert(base.folder, tmp_path / "neox", model, ParallelConfig(tensor=2))
    shards = NeoxCheckpoint(tmp_path / "neox")
    assert prove_conversion(base.folder, shards, model)["largest_logit_difference"] < 1e-5
    with pytest.raises(CheckpointError, match=r"differ by"):
        prove(shards, base.folder, base.model)
    export_meta(tmp_path / "neox", tmp_path / "meta", model, shards=2)
    assert MetaCheckpoint(tmp_path / "meta").model == model
    with pytest.raises(ConfigError, match=r"Meta's format cannot say that positions are scaled by rope_type='linear'"):
        export_meta(tmp_path / "neox", tmp_path / "other", model_of(rope_scaling=LINEAR), shards=2)
    assert not (tmp_path / "other").exists()


def test_metas_format_that_leaves_the_factor_open(write_base: Callable[..., Any]) -> None:
    base = write_base(use_scaled_rope=True)
    with pytest.raises(CheckpointError, match=r"use_scaled_rope without rope_scaling_factor: add it"):
        MetaCheckpoint(base.folder)


@pytest.mark.parametrize("sequence_length", [128, 4096])
def test_yarn_s_factor_is_the_ratio_of_positions_too(
    model_of: Callable[..., ModelConfig], sequence_length: int
) -> None:
    """transformers 4 computes with this ratio and not with the factor."""
    yarn = RopeScalingConfig(rope_type="yarn", factor=2.5, original_max_position_embeddings=64)
    content = json.loads(config_files(model_of(rope_scaling=yarn), sequence_length, torch.bfloat16)["config.json"])
    assert content["max_position_embeddings"] == 160
    content = json.loads(config_files(model_of(rope_scaling=LLAMA3), sequence_length, torch.bfloat16)["config.json"])
    assert content["max_position_embeddings"] == sequence_length
