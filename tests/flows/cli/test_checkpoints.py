"""`llemma convert`, `llemma export` and `llemma inspect` on a tiny random model."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from sentencepiece import SentencePieceProcessor
from transformers import AutoTokenizer
from typer.testing import CliRunner

from flows.cli import app
from neox_core import artifact as artifact_module
from neox_core.artifact import read_artifact
from neox_core.checkpoint.conversion.convert import convert
from neox_core.checkpoint.conversion.toy_base import make_random_base
from neox_core.checkpoint.formats.meta import MetaCheckpoint
from neox_core.config import ModelConfig, ParallelConfig
from neox_core.errors import CheckpointError
from neox_core.storage import folders
from neox_core.storage.digest import sha256_of
from neox_core.storage.object_store import ObjectStore
from neox_core.storage.s3_target import S3Target
from tests.paths import ROOT


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


def test_there_and_back_in_an_object_store(
    base: Path, tmp_path: Path, store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Meta -> NeoX -> Hugging Face -> NeoX -> Meta, of which only the first and the last folder are local."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", store.endpoint)
    monkeypatch.setattr(folders, "_BLOCK_BYTES", 60_000)
    at = store.url().rstrip("/")
    invoke("convert", "--from", base, "--to", f"{at}/neox", "--tp", 4, "--vocab-multiple", 16)
    written = {info.key: info.etag for info in store.list("neox/")}
    assert "neox/artifact.json" in written
    artifact = json.loads(store.get_text("neox/artifact.json") or "")
    for record in artifact["files"]:
        content = store.get_range(f"neox/{record['path']}", 0, record["size"] + 1)
        assert (len(content), hashlib.sha256(content).hexdigest()) == (record["size"], record["sha256"])
    # Finished: not made again. Damaged or lost: made again, the others are kept.
    invoke("convert", "--from", base, "--to", f"{at}/neox", "--tp", 4, "--vocab-multiple", 16)
    assert {info.key: info.etag for info in store.list("neox/")} == written
    store.delete(["neox/global_step0/mp_rank_02_model_states.pt", "neox/artifact.json"])
    store.put_text("neox/global_step0/mp_rank_00_model_states.pt", "damaged")
    invoke("convert", "--from", base, "--to", f"{at}/neox", "--tp", 4, "--vocab-multiple", 16)
    again = {info.key: info.etag for info in store.list("neox/") if info.key.endswith(".pt")}
    assert again.items() <= written.items()
    assert "NeoX, 4 tensor-parallel ranks" in invoke("inspect", f"{at}/neox")

    invoke("export", "--from", f"{at}/neox", "--to", f"{at}/hf")
    invoke("convert", "--from", f"{at}/hf", "--to", f"{at}/second", "--tp", 2)
    invoke("export", "--from", f"{at}/second", "--to", tmp_path / "meta", "--format", "meta")
    whole, found = (MetaCheckpoint(folder).tensor for folder in (base, tmp_path / "meta"))
    for name in ("tok_embeddings.weight", "output.weight", "layers.1.attention.wk.weight", "norm.weight"):
        assert torch.equal(whole(name), found(name))


def test_an_interrupted_upload_leaves_nothing(base: Path, store: ObjectStore) -> None:
    folder = S3Target(store, "neox/")

    def stop(share: float, text: str) -> None:
        raise KeyboardInterrupt

    model = MetaCheckpoint(base).model
    with pytest.raises(KeyboardInterrupt):
        convert(base, folder, model, ParallelConfig(tensor=2, pipeline=2), stop)
    assert "neox/latest" not in {info.key for info in store.list("neox/")}
    with pytest.raises(ZeroDivisionError), store.uploading("neox/half", 10) as put:  # noqa: PT012 (parts, then the error)
        put(memoryview(b"0123456789abc"))
        raise ZeroDivisionError
    assert not store.list("neox/half")
    content = bytes(range(256)) * 45_000  # two parts: S3 wants 5 MiB at least but for the last
    with store.uploading("parts", 5 << 20) as put:
        for start in range(0, len(content), 1_000_000):
            put(memoryview(content)[start : start + 1_000_000])
    assert store.get_range("parts", 0, 2 * len(content)) == content
    assert store.list("parts")[0].etag.endswith("-2")
    convert(base, folder, model, ParallelConfig(tensor=2, pipeline=2))
    assert "neox/latest" in {info.key for info in store.list("neox/")}


def test_a_prefix_without_a_model(tmp_path: Path, store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", store.endpoint)
    with pytest.raises(CheckpointError, match=r"checkpoint folder s3://.*/nothing does not exist"):
        invoke("convert", "--from", f"{store.url()}nothing", "--to", tmp_path / "neox")


def test_export_with_a_tokenizer(tmp_path: Path) -> None:
    model = ModelConfig(
        num_layers=1, hidden_size=64, num_attention_heads=8, num_kv_heads=8, intermediate_size=192, vocab_size=2048,
        rope_theta=1e6,
    )  # fmt: skip
    make_random_base(model, tmp_path / "base", seed=3)
    invoke("convert", "--from", tmp_path / "base", "--to", tmp_path / "neox")
    tokenizer = ROOT / "data/tokenizers/demo-2048.model"
    invoke("export", "--from", tmp_path / "neox", "--to", tmp_path / "hf", "--tokenizer", tokenizer)
    artifact = read_artifact(tmp_path / "hf")
    assert artifact.summary["tokenizer_texts"] > 5
    assert {"tokenizer.json", "tokenizer.model", "config.json"} <= {record.path for record in artifact.files}
    loaded = AutoTokenizer.from_pretrained(tmp_path / "hf")
    text = "Let $x$ be."
    assert loaded(text)["input_ids"] == SentencePieceProcessor(model_file=str(tokenizer)).encode(text)


def test_files_are_not_read_again_for_their_digests(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []

    def watched(path: Path) -> str:
        read.append(path.name)
        return sha256_of(path)

    monkeypatch.setattr(artifact_module, "sha256_of", watched)
    invoke("convert", "--from", base, "--to", tmp_path / "neox", "--tp", 2)
    assert "consolidated.00.pth" in read
    assert not [name for name in read if name.endswith(".pt")]
    for record in read_artifact(tmp_path / "neox").files:
        assert record.sha256 == sha256_of(tmp_path / "neox" / record.path)
