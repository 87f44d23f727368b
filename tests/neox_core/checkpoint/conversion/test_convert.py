from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from neox_core.checkpoint.conversion.convert import convert, open_source
from neox_core.checkpoint.conversion.export import export_huggingface, export_meta
from neox_core.checkpoint.conversion.proof import prove_conversion
from neox_core.checkpoint.conversion.reference import llama_from_meta
from neox_core.checkpoint.formats.meta import MetaCheckpoint
from neox_core.checkpoint.formats.neox import NeoxCheckpoint
from neox_core.config import ModelConfig, ParallelConfig
from neox_core.errors import CheckpointError, ConfigError, StorageError
from tests.waiting import wait_for

WriteBase = Callable[..., Any]
ModelOf = Callable[..., ModelConfig]


def read_meta(folder: Path) -> list[dict[str, torch.Tensor]]:
    return [torch.load(path, weights_only=True) for path in sorted(folder.glob("*.pth"))]


@pytest.mark.parametrize("pipeline", [1, 2, 4])
@pytest.mark.parametrize("tensor", [1, 2, 4, 8])
@pytest.mark.parametrize("kv_heads", [8, 2], ids=["MHA", "GQA"])
def test_round_trip_is_bit_identical(
    write_base: WriteBase, model_of: ModelOf, tmp_path: Path, kv_heads: int, tensor: int, pipeline: int
) -> None:
    """Meta -> NeoX -> Hugging Face -> NeoX -> Meta, with more ranks than KV heads too."""
    base = write_base(model_of(num_kv_heads=kv_heads))
    model, parallel = base.model, ParallelConfig(tensor=tensor, pipeline=pipeline)
    convert(base.folder, tmp_path / "neox", model, parallel)
    assert NeoxCheckpoint(tmp_path / "neox").tensor_parallel == tensor
    export_huggingface(tmp_path / "neox", tmp_path / "hf", model, None, 64)
    convert(tmp_path / "hf", tmp_path / "again", model, ParallelConfig(tensor=2, pipeline=3 - min(pipeline, 2)))
    export_meta(tmp_path / "again", tmp_path / "meta", model, shards=2)
    for original, found in zip(read_meta(base.folder), read_meta(tmp_path / "meta"), strict=True):
        assert original.keys() == found.keys()
        assert all(torch.equal(weight, found[name]) for name, weight in original.items())
    assert MetaCheckpoint(tmp_path / "meta").model == model
    # What transformers' own way of reading Meta's files gives.
    reference = llama_from_meta(base.folder, model, 8).state_dict()
    huggingface = load_file(tmp_path / "hf/model.safetensors")
    assert huggingface.keys() == reference.keys()
    assert all(torch.equal(weight.float(), reference[name]) for name, weight in huggingface.items())
    assert all(weight.dtype == torch.bfloat16 for weight in huggingface.values())


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


def test_half_precision_is_rounded_and_said(write_base: WriteBase, tmp_path: Path) -> None:
    base = write_base()
    for path in base.folder.glob("*.pth"):
        content = {name: (value.float() * 1.003).half() for name, value in torch.load(path, weights_only=True).items()}
        torch.save(content, path)
    summary = convert(base.folder, tmp_path / "neox", base.model, ParallelConfig(tensor=2, pipeline=2))
    assert summary["rounded_from"] == "float16"
    found = torch.load(tmp_path / "neox/global_step0/layer_06-model_00-model_states.pt", weights_only=True)
    expected = (base.weights["output.weight"][:64].float() * 1.003).half().bfloat16()
    assert torch.equal(found["final_linear.weight"], expected)
    assert (
        prove_conversion(base.folder, NeoxCheckpoint(tmp_path / "neox"), base.model)["largest_layer_difference"] < 1e-5
    )


class Case(NamedTuple):
    """Weights that are not finite."""

    name: str
    shard: int
    value: float
    row: int
    column: int


@pytest.mark.parametrize(
    "case",
    [Case("layers.1.attention.wk.weight", 1, float("nan"), 3, 5), Case("norm.weight", 0, float("-inf"), 0, 7)],
    ids=lambda case: case.name,
)
def test_weights_that_are_not_finite_are_named(write_base: WriteBase, tmp_path: Path, case: Case) -> None:
    base = write_base()
    for path in sorted(base.folder.glob("*.pth"))[case.shard :]:
        content = torch.load(path, weights_only=True)
        content[case.name].view(-1, content[case.name].shape[-1])[case.row, case.column] = case.value
        torch.save(content, path)
    path = base.folder / f"consolidated.{case.shard:02d}.pth"
    where = rf"{path.name}: {case.name} is {case.value} in row {case.row}, column {case.column}"
    with pytest.raises(CheckpointError, match=where):
        convert(base.folder, tmp_path / "neox", base.model, ParallelConfig(tensor=2))
    assert not (tmp_path / "neox" / "latest").exists()
    assert not [path for path in (tmp_path / "neox").rglob("*") if path.name.endswith(".tmp")]


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
    with pytest.raises(ConfigError, match=r"parallel\.tensor 16 does not divide model\.num_attention_heads 8"):
        convert(base.folder, tmp_path / "neox", base.model, ParallelConfig(tensor=16))


@pytest.mark.parametrize("pipeline", [1, 2])
def test_another_conversion_is_replaced(write_base: WriteBase, tmp_path: Path, pipeline: int) -> None:
    base = write_base()
    target = tmp_path / "neox"
    convert(base.folder, target, base.model, ParallelConfig(tensor=4, pipeline=pipeline))
    convert(base.folder, target, base.model, ParallelConfig(tensor=2, pipeline=3 - pipeline))
    assert NeoxCheckpoint(target).tensor_parallel == 2
    form = "mp_rank" if pipeline == 2 else "layer_"
    assert all(path.name.startswith(form) for path in (target / "global_step0").iterdir())


def times(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("global_step0/*.pt")}


def test_what_is_finished_and_intact_is_not_made_again(write_base: WriteBase, tmp_path: Path) -> None:
    base, target, parallel = write_base(), tmp_path / "neox", ParallelConfig(tensor=2, pipeline=2)
    convert(base.folder, target, base.model, parallel)
    before = times(target)
    convert(base.folder, target, base.model, parallel)
    assert times(target) == before
    damaged = target / "global_step0/layer_03-model_01-model_states.pt"
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    missing = target / "global_step0/layer_05-model_00-model_states.pt"
    missing.unlink()
    convert(base.folder, target, base.model, parallel)
    after = times(target)
    assert {name for name in after if after[name] != before[name]} == {damaged.name, missing.name}
    assert prove_conversion(base.folder, NeoxCheckpoint(target), base.model)
    # Another source's files are never kept.
    path = base.folder / "consolidated.00.pth"
    os.utime(path, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns + 1))
    convert(base.folder, target, base.model, parallel)
    assert not times(target).items() & after.items()


KILLED = """
import sys
from pathlib import Path
from neox_core.checkpoint.formats import outputs
from neox_core.checkpoint.conversion.convert import convert
from neox_core.checkpoint.formats.meta import MetaCheckpoint
from neox_core.config import ParallelConfig

source, target = Path(sys.argv[1]), Path(sys.argv[2])
outputs._WORKERS = 1
written = outputs._write

def slowly(target, file, meter, fillers):
    if len(list(target.path.glob("global_step0/*.pt"))) == 3:
        with target.create(file.path, 4) as put:
            put(memoryview(b"half"))
            print("waiting", flush=True)
            import time
            time.sleep(600)
    return written(target, file, meter, fillers)

outputs._write = slowly
convert(source, target, MetaCheckpoint(source).model, ParallelConfig(tensor=2, pipeline=2))
"""


def test_a_killed_conversion_goes_on_at_the_next_file(write_base: WriteBase, tmp_path: Path) -> None:
    base, target = write_base(), tmp_path / "neox"
    command = [sys.executable, "-c", KILLED, str(base.folder), str(target)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "waiting\n"
        wait_for(lambda: len(json.loads((target / ".conversion.json").read_text())["files"]) >= 3, 300.0)
        process.kill()
    before = times(target)
    assert len(before) == 3
    assert not (target / "latest").exists()
    convert(base.folder, target, base.model, ParallelConfig(tensor=2, pipeline=2))
    after = times(target)
    assert len(after) == 10
    assert before.items() <= after.items()
    assert not list(target.rglob("*.tmp"))
    assert prove_conversion(base.folder, NeoxCheckpoint(target), base.model)


def test_a_disk_that_is_too_small_is_found_before_the_start(
    write_base: WriteBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = write_base()
    usage = shutil.disk_usage(tmp_path)._replace(free=100_000)
    monkeypatch.setattr("neox_core.storage.targets.shutil.disk_usage", lambda path: usage)
    with pytest.raises(StorageError, match=r"needs 2\d\d,\d\d\d more bytes .*, but its disk has 100,000"):
        convert(base.folder, tmp_path / "neox", base.model, ParallelConfig(tensor=2))
    assert not list(tmp_path.rglob("*.pt"))


def test_a_failed_proof_publishes_and_deletes_nothing(write_base: WriteBase, tmp_path: Path) -> None:
    base, target = write_base(), tmp_path / "neox"

    def refuse(source: object, shards: NeoxCheckpoint) -> dict[str, Any]:
        raise CheckpointError(f"not the same, {shards.tensor_parallel} ranks")

    with pytest.raises(CheckpointError, match="not the same, 2 ranks"):
        convert(base.folder, target, base.model, ParallelConfig(tensor=2), prove=refuse)
    assert len(times(target)) == 2
    assert not (target / "latest").exists()


def write_huggingface(base: Any, folder: Path, change: dict[str, Any]) -> None:
    """A base model's export, whose config.json is changed."""
    shards = folder.with_name("neox")
    convert(base.folder, shards, base.model, ParallelConfig())
    export_huggingface(shards, folder, base.model, None, 64)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": None}, r"transformers refuses .*config\.json"),
        ({"max_position_embeddings": None}, r"transformers refuses .*config\.json.*max_position_embeddings"),
        ({"bos_token_id": "<s>"}, "bos_token_id is '<s>': give an id"),
    ],
)
def test_what_the_proof_could_not_read_is_refused_before_a_shard_is_written(
    write_base: WriteBase, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    base, folder = write_base(), tmp_path / "hf"
    write_huggingface(base, folder, change)
    with pytest.raises(CheckpointError, match=message):
        convert(folder, tmp_path / "out", base.model, ParallelConfig(), prove=lambda source, shards: {})
    assert not (tmp_path / "out").exists()


def test_an_interrupted_conversion_has_no_latest(write_base: WriteBase, tmp_path: Path) -> None:
    base, target, parallel = write_base(), tmp_path / "neox", ParallelConfig(tensor=2, pipeline=2)

    def stop(share: float, text: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(base.folder, target, base.model, parallel, stop)
    assert not (target / "latest").exists()
    assert not list(target.rglob("*.tmp"))


def test_progress_rises_to_one(write_base: WriteBase, tmp_path: Path) -> None:
    base = write_base()
    seen: list[tuple[float, str]] = []
    convert(base.folder, tmp_path / "neox", base.model, ParallelConfig(tensor=2), lambda *report: seen.append(report))
    shares = [share for share, _ in seen]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert any(" MB/s, " in text and text.endswith(" s left") for _, text in seen)


def test_a_damaged_source_yields_nothing(write_base: WriteBase, tmp_path: Path) -> None:
    base = write_base()
    (base.folder / "consolidated.00.pth").unlink()
    with pytest.raises(CheckpointError, match=r"lacks consolidated\.00\.pth"):
        convert(base.folder, tmp_path / "neox", base.model, ParallelConfig())
    assert not (tmp_path / "neox").exists()


def test_a_source_cut_off_in_the_middle(write_base: WriteBase, tmp_path: Path) -> None:
    """The index at the end is whole, but a tensor's bytes are not where it says."""
    base = write_base()
    folder = tmp_path / "hf"
    folder.mkdir()
    convert(base.folder, tmp_path / "neox", base.model, ParallelConfig())
    export_huggingface(tmp_path / "neox", folder, base.model, None, 64)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=r"model\.safetensors .* is damaged, truncated.*would end at byte"):
        convert(folder, tmp_path / "again", base.model, ParallelConfig())


@pytest.mark.parametrize("method", ["mean", "normal", "zeros"])
def test_new_tokens_and_padding(write_base: WriteBase, tmp_path: Path, method: Any) -> None:
    base = write_base()
    padded = base.model.model_copy(update={"vocab_size": 144, "unpadded_vocab_size": 131})
    with pytest.raises(ConfigError, match=r"vocab_size 131 \(source: 128\)"):
        convert(base.folder, tmp_path / "neox", padded, ParallelConfig(tensor=2))
    convert(
        base.folder,
        tmp_path / "neox",
        padded,
        ParallelConfig(tensor=8),
        base_vocab_size=128,
        new_tokens=method,
        prove=lambda source, shards: prove_conversion(source.folder, shards, padded),
    )
    export_huggingface(tmp_path / "neox", tmp_path / "hf", padded, None, 64)
    exported = load_file(tmp_path / "hf/model.safetensors")
    for ours, theirs in (("model.embed_tokens.weight", "tok_embeddings.weight"), ("lm_head.weight", "output.weight")):
        old, new = exported[ours][:128], exported[ours][128:].float()
        assert torch.equal(old, base.weights[theirs])
        assert new.shape == (3, 64)
        if method == "mean":
            torch.testing.assert_close(new, old.float().mean(0).expand(3, 64), rtol=1e-2, atol=1e-4)
        elif method == "zeros":
            assert not new.any()
        else:
            assert new.std() == pytest.approx(0.02, rel=0.3)
            assert not torch.equal(new[0], new[1])
    assert open_source(tmp_path / "hf").model == base.model.model_copy(update={"vocab_size": 131})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, r"llama3 needs low_freq_factor"),
        (
            {"rope_parameters": {"type": "longrope", "factor": 2.0}},
            r"positions are scaled \(longrope\).*linear, llama3, yarn",
        ),
        ({"rope_parameters": {"type": "yarn", "factor": 2.0}}, r"yarn needs original_max_position_embeddings"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, r"positions are scaled \(dynamic\)"),
        (
            {
                "rope_scaling": {"type": "linear", "factor": 2.0},
                "rope_parameters": {"rope_type": "linear", "factor": 4.0},
            },
            r"rope_parameters and rope_scaling differ, .*factor=4\.0.*factor=2\.0",
        ),
        ({"rope_theta": 5.0}, r"gives two RoPE bases, \[5\.0, 1000000\.0\]"),
        ({"attention_bias": True}, r"q_proj\.bias is missing"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"model_type": "gemma"}, "model_type is 'gemma', but only llama"),
        ({"head_dim": 16}, r"has shape \(64, 64\), but the model needs \(128, 64\)"),
        ({"hidden_size": None}, r"hidden_size is null: give a whole number from 1"),
        ({"num_hidden_layers": 3}, r"layer 4: .* is missing"),
        ({"num_hidden_layers": 1}, r"holds model\.layers\.1.*unknown in a Llama of 1 layers"),
        ({"intermediate_size": 190}, r"has shape \(192, 64\), but the model needs \(190, 64\)"),
    ],
)
def test_hugging_face_folders_that_cannot_be_right(
    write_base: WriteBase, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    base, folder = write_base(), tmp_path / "hf"
    write_huggingface(base, folder, change)
    with pytest.raises(CheckpointError, match=message):
        open_source(folder)


def test_hugging_face_folders_of_several_kinds(write_base: WriteBase, tmp_path: Path) -> None:
    base, folder = write_base(), tmp_path / "hf"
    convert(base.folder, tmp_path / "neox", base.model, ParallelConfig())
    export_huggingface(tmp_path / "neox", folder, base.model, None, 64, max_file_bytes=50_000)
    assert len(list(folder.glob("*.safetensors"))) > 2
    assert torch.equal(open_source(folder).weights.tensor("lm_head.weight"), base.weights["output.weight"])
    for path in folder.glob("model*"):
        path.unlink()
    with pytest.raises(CheckpointError, match=r"holds neither model\.safetensors nor .*because they are pickles"):
        open_source(folder)
    # Tied embeddings: the output is the embedding.
    export_huggingface(tmp_path / "neox", folder, base.model, None, 64)
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is missing"):
        open_source(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    assert torch.equal(open_source(folder).weights.tensor("lm_head.weight"), base.weights["tok_embeddings.weight"])


def test_two_conversions_into_one_folder(write_base: WriteBase, tmp_path: Path) -> None:
    base, target, parallel = write_base(), tmp_path / "neox", ParallelConfig(tensor=2)
    seen: list[str] = []

    def second(share: float, text: str) -> None:
        if not seen:
            seen.append(text)
            with pytest.raises(CheckpointError, match=r"another conversion is writing to .*neox: wait for it"):
                convert(base.folder, target, base.model, parallel)

    convert(base.folder, target, base.model, parallel, second)
    assert seen
    assert prove_conversion(base.folder, NeoxCheckpoint(target), base.model)
