"""`llemma convert`, `llemma export` and `llemma inspect` on a tiny random model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from flows.cli import app
from neox_core.artifact import read_artifact
from neox_core.checkpoint.toy_base import make_random_base
from neox_core.config import ModelConfig
from neox_core.errors import CheckpointError


def invoke(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A folder in Meta's format: 2 layers, 8 heads, 2 KV heads, 130 tokens."""
    model = ModelConfig(
        num_layers=2,
        hidden_size=64,
        num_attention_heads=8,
        num_kv_heads=2,
        intermediate_size=192,
        vocab_size=130,
        rope_theta=1e6,
    )
    make_random_base(model, tmp_path / "base", seed=3)
    return tmp_path / "base"


def test_there_and_back(base: Path, tmp_path: Path) -> None:
    neox, meta = tmp_path / "neox", tmp_path / "meta"
    invoke("convert", "--from", base, "--to", neox, "--tp", 4, "--pp", 2, "--vocab-multiple", 16)
    artifact = read_artifact(neox)
    assert artifact.summary["largest_layer_difference"] < 1e-5
    assert artifact.config["model"]["vocab_size"] == 144
    before = (neox / "artifact.json").stat().st_mtime_ns
    invoke("convert", "--from", base, "--to", neox, "--tp", 4, "--pp", 2, "--vocab-multiple", 16)
    assert (neox / "artifact.json").stat().st_mtime_ns == before
    shown = invoke("inspect", neox)
    assert "NeoX, 4 tensor-parallel ranks" in shown
    invoke("export", "--from", neox, "--to", meta, "--format", "meta", "--shards", 2)
    for shard in ("consolidated.00.pth", "consolidated.01.pth"):
        original, found = (torch.load(folder / shard, weights_only=True) for folder in (base, meta))
        assert original.keys() == found.keys()
        assert all(torch.equal(weight, found[name]) for name, weight in original.items())
    assert "Meta" in invoke("inspect", meta)


def test_a_folder_without_its_architecture(base: Path, tmp_path: Path) -> None:
    invoke("convert", "--from", base, "--to", tmp_path / "neox", "--tp", 2)
    (tmp_path / "neox/artifact.json").unlink()
    with pytest.raises(CheckpointError, match="give the run's YAML file with --config"):
        invoke("inspect", tmp_path / "neox")
