"""One list of a model's files, which what lies next to them does not change."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from neox_core.checkpoint.conversion.convert import convert, open_source
from neox_core.checkpoint.conversion.export import export_huggingface
from neox_core.checkpoint.conversion.proof import prove_conversion
from neox_core.checkpoint.formats.model_files import model_files
from neox_core.checkpoint.formats.neox import NeoxCheckpoint
from neox_core.config import ParallelConfig
from neox_core.errors import CheckpointError, ConfigError
from neox_core.storage.folders import LocalFolder

WriteBase = Callable[..., Any]


def clutter(folder: Path, name: str) -> None:
    """What browsers, other systems and careful people leave next to a file."""
    path = folder / name
    stem, _, end = name.rpartition(".")
    for copy in (f"{stem} (1).{end}", f"{stem}.bak.{end}", f"{stem}.old-{end}"):
        shutil.copy(path, folder / copy)
    (folder / f"._{name}").write_bytes(b"\x00\x05\x16\x07")
    (folder / f"{stem}.part.{end}").write_bytes(path.read_bytes()[:100])


def huggingface(write_base: WriteBase, folder: Path, **options: Any) -> Any:
    base = write_base()
    convert(base.folder, folder.parent / "neox", base.model, ParallelConfig(tensor=2))
    export_huggingface(folder.parent / "neox", folder, base.model, None, 64, **options)
    return base


def test_clutter_beside_metas_shards(write_base: WriteBase, tmp_path: Path) -> None:
    base = write_base()
    expected = model_files(LocalFolder(base.folder)).names
    assert expected == ("params.json", "consolidated.00.pth", "consolidated.01.pth")
    clutter(base.folder, "consolidated.01.pth")
    (base.folder / "consolidated.2.pth").write_bytes(b"")
    assert model_files(LocalFolder(base.folder)).names == expected
    convert(base.folder, tmp_path / "neox", base.model, ParallelConfig(tensor=2))
    assert prove_conversion(base.folder, NeoxCheckpoint(tmp_path / "neox"), base.model)


@pytest.mark.parametrize("limit", [10**9, 50_000])
def test_clutter_beside_hugging_faces_files(write_base: WriteBase, tmp_path: Path, limit: int) -> None:
    folder = tmp_path / "hf"
    base = huggingface(write_base, folder, max_file_bytes=limit)
    expected = model_files(LocalFolder(folder))
    assert len(expected.weights) == (1 if limit == 10**9 else 4)
    tensors = load_file(folder / expected.weights[0])
    save_file({name: tensor * 2 for name, tensor in tensors.items()}, folder / "backup.safetensors")
    clutter(folder, expected.weights[0])
    assert model_files(LocalFolder(folder)) == expected
    convert(folder, tmp_path / "again", base.model, ParallelConfig(tensor=2))
    assert prove_conversion(folder, NeoxCheckpoint(tmp_path / "again"), base.model)


def test_two_models_in_one_folder(write_base: WriteBase, tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    huggingface(write_base, folder, max_file_bytes=50_000)
    shutil.copy(next(folder.glob("model-00001*")), folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"holds model\.safetensors, and .* are these two models\? Move one away"):
        open_source(folder)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model.safetensors"}}))
    assert model_files(LocalFolder(folder)).weights == ("model.safetensors",)
    index.write_text(json.dumps({"weight_map": {"a": 1}}))
    with pytest.raises(CheckpointError, match=r"has no weight_map from tensors to files"):
        open_source(folder)


def test_a_tied_model_with_another_head(write_base: WriteBase, tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    base = huggingface(write_base, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    with pytest.raises(ConfigError, match=r"tied_embeddings False \(source: True\)"):
        convert(folder, tmp_path / "again", base.model, ParallelConfig())
    model = base.model.model_copy(update={"tied_embeddings": True})
    with pytest.raises(CheckpointError, match=r"says tie_word_embeddings, but lm_head\.weight is not model\.embed"):
        convert(folder, tmp_path / "again", model, ParallelConfig())
    assert not (tmp_path / "again").exists()
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors")
    convert(folder, tmp_path / "again", model, ParallelConfig())
    assert prove_conversion(folder, NeoxCheckpoint(tmp_path / "again"), model)


def test_norms_in_fp32_beside_half_weights_are_rounded(write_base: WriteBase, tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    base = huggingface(write_base, folder)
    tensors = load_file(folder / "model.safetensors")
    norms = {name: tensor.float() * 1.001 for name, tensor in tensors.items() if "norm" in name}
    save_file(tensors | norms, folder / "model.safetensors")
    summary = convert(folder, tmp_path / "again", base.model, ParallelConfig(tensor=2))
    assert summary["rounded_from"] == "float32 in 5 of 21 tensors"
    assert prove_conversion(folder, NeoxCheckpoint(tmp_path / "again"), base.model)


def test_parameters_in_a_shard(write_base: WriteBase, tmp_path: Path) -> None:
    base = write_base(shards=1)
    path = base.folder / "consolidated.00.pth"
    content = torch.load(path, weights_only=True)
    torch.save({name: torch.nn.Parameter(tensor) for name, tensor in content.items()}, path)
    convert(base.folder, tmp_path / "neox", base.model, ParallelConfig(tensor=2))
    assert prove_conversion(base.folder, NeoxCheckpoint(tmp_path / "neox"), base.model)


@pytest.mark.parametrize("vocab_size", [-1, 128])
def test_an_embedding_cut_by_rows(write_base: WriteBase, tmp_path: Path, vocab_size: int) -> None:
    """As Llama 3's shards have it; older ones cut it by columns."""
    base = write_base(shards=4, vocab_size=vocab_size)
    for number, rows in enumerate(base.weights["tok_embeddings.weight"].chunk(4)):
        path = base.folder / f"consolidated.{number:02d}.pth"
        torch.save(torch.load(path, weights_only=True) | {"tok_embeddings.weight": rows.clone()}, path)
    source = open_source(base.folder)
    assert source.model == base.model
    assert torch.equal(source.weights.tensor("model.embed_tokens.weight"), base.weights["tok_embeddings.weight"])
    convert(base.folder, tmp_path / "neox", base.model, ParallelConfig(tensor=2))
    assert prove_conversion(base.folder, NeoxCheckpoint(tmp_path / "neox"), base.model)


def test_a_shard_without_its_index_is_named(write_base: WriteBase, tmp_path: Path) -> None:
    huggingface(write_base, tmp_path / "hf")
    (tmp_path / "hf/model.safetensors").rename(tmp_path / "hf/model-00001-of-00002.safetensors")
    with pytest.raises(CheckpointError, match=r"holds model-00001-of-00002\.safetensors, but neither .* index too"):
        open_source(tmp_path / "hf")


def test_a_tensor_in_two_files_is_refused(write_base: WriteBase, tmp_path: Path) -> None:
    """transformers takes that of the last file, whatever the index says."""
    folder = tmp_path / "hf"
    huggingface(write_base, folder, max_file_bytes=50_000)
    files = model_files(LocalFolder(folder))
    name = "model.norm.weight"
    other = next(file for file in files.weights if file != files.index[name])
    tensors = load_file(folder / other)
    save_file(tensors | {name: torch.ones(64)}, folder / other)
    with pytest.raises(CheckpointError, match=rf"holds {name} both in {files.index[name]} and in {other}"):
        open_source(folder)
    save_file(tensors | {"not.in.the.index": torch.ones(64)}, folder / other)
    open_source(folder)


@pytest.mark.parametrize("whole", [True, False])
def test_an_adapter_is_refused(write_base: WriteBase, tmp_path: Path, whole: bool) -> None:
    folder = tmp_path / "hf"
    huggingface(write_base, folder)
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    shutil.copy(folder / "model.safetensors", folder / "adapter_model.safetensors")
    if not whole:
        (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"holds adapter_config\.json, an adapter \(LoRA\).*merge it"):
        open_source(folder)
