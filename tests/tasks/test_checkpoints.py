"""`llemma convert` and `llemma export` into places that hold something already."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from neox_core.checkpoint.conversion.toy_base import make_random_base
from neox_core.checkpoint.formats.special_ids import config_differences
from neox_core.config import ModelConfig, ParallelConfig
from neox_core.errors import CheckpointError, ConfigError, StorageError
from neox_core.progress import silent
from neox_core.storage.object_store import ObjectStore
from neox_core.storage.targets import LocalTarget
from tasks.checkpoints import convert_folder, export_folder
from tests.byte_level import make_byte_level

MODEL = ModelConfig(
    num_layers=1, hidden_size=64, num_attention_heads=4, num_kv_heads=2, intermediate_size=192, vocab_size=64,
    rope_theta=1e6,
)  # fmt: skip


@pytest.fixture
def base(tmp_path: Path) -> Path:
    make_random_base(MODEL, tmp_path / "base", seed=3)
    return tmp_path / "base"


def contents(folder: Path) -> dict[str, bytes]:
    """Every file, hidden ones too."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def convert_to(base: Path, target: Path | str, tensor: int = 1, **options: Any) -> Any:
    return convert_folder(str(base), str(target), ParallelConfig(tensor=tensor), 1, silent, **options)


def export_to(source: Path, target: Path | str, form: Any = "huggingface", **options: Any) -> Any:
    return export_folder(str(source), str(target), form, None, 1, None, 64, silent, **options)


def a_file(folder: Path) -> None:
    (folder / "notes.txt").write_text("mine")


def a_meta_model(folder: Path) -> None:
    make_random_base(MODEL, folder, seed=8)


def a_stray_shard(folder: Path) -> None:
    (folder / "consolidated.01.pth").write_bytes(b"another")


def a_stray_rank(folder: Path) -> None:
    (folder / "global_step0").mkdir()
    (folder / "global_step0/mp_rank_01_model_states.pt").write_bytes(b"another")
    (folder / "latest").write_text("global_step500")


@pytest.mark.parametrize("fill", [a_file, a_meta_model, a_stray_shard, a_stray_rank])
@pytest.mark.parametrize("command", ["convert", "export", "export meta"])
def test_what_is_not_our_own_is_refused_before_anything_is_touched(
    base: Path, tmp_path: Path, fill: Callable[[Path], None], command: str
) -> None:
    convert_to(base, tmp_path / "neox")
    target = tmp_path / "target"
    target.mkdir()
    fill(target)
    before = contents(target)
    form = "meta" if command.endswith("meta") else "huggingface"
    run = (
        partial(convert_to, base, target)
        if command == "convert"
        else partial(export_to, tmp_path / "neox", target, form)
    )
    with pytest.raises(CheckpointError, match=rf"target holds .* llemma {command.split()[0]} did not write.*overwrite"):
        run()
    assert contents(target) == before


def test_the_other_commands_output_is_not_our_own(base: Path, tmp_path: Path) -> None:
    convert_to(base, tmp_path / "neox")
    before = contents(tmp_path / "neox")
    with pytest.raises(CheckpointError, match="llemma export did not write"):
        export_to(tmp_path / "neox", tmp_path / "neox")
    with pytest.raises(CheckpointError, match="llemma convert did not write"):
        convert_to(base, base)
    assert contents(tmp_path / "neox") == before


def test_overwrite_replaces_the_model_and_leaves_other_files(base: Path, tmp_path: Path) -> None:
    convert_to(base, tmp_path / "neox")
    target = tmp_path / "target"
    target.mkdir()
    a_meta_model(target)
    a_file(target)
    export_to(tmp_path / "neox", target, overwrite=True)
    assert sorted(path.name for path in target.iterdir() if not path.name.startswith(".")) == [
        "artifact.json", "config.json", "generation_config.json", "model.safetensors", "notes.txt",
    ]  # fmt: skip
    assert not (target / ".incoming").exists()


@pytest.mark.parametrize("command", ["convert", "export"])
def test_a_failed_proof_leaves_what_was_there(
    base: Path, tmp_path: Path, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Our own earlier output of another model, complete: it goes when the new one is proven, not before."""
    target, other = tmp_path / "target", tmp_path / "other"
    make_random_base(MODEL, other, seed=9)

    def make(source: Path) -> None:
        if command == "convert":
            convert_to(source, target, tensor=2 if source == other else 1)
        else:
            neox = tmp_path / f"neox-{source.name}"
            convert_to(source, neox)
            export_to(neox, target)

    make(base)
    visible = {name: content for name, content in contents(target).items() if not name.startswith(".")}

    def refuse(*arguments: Any, **options: Any) -> Any:
        raise CheckpointError("not the same")

    with monkeypatch.context() as patch:
        name = "conversion.proof.prove_conversion" if command == "convert" else "conversion.export.prove_export"
        patch.setattr(f"neox_core.checkpoint.{name}", refuse)
        if command == "export":
            convert_to(other, tmp_path / "neox-other")
        again = partial(make, other) if command == "convert" else partial(export_to, tmp_path / "neox-other", target)
        with pytest.raises(CheckpointError, match="not the same"):
            again()
    now = {name: content for name, content in contents(target).items() if not name.startswith(".")}
    assert now == visible
    make(other)
    after = contents(target)
    assert not [name for name in after if name.startswith(".incoming")]
    if command == "convert":
        assert {name for name in after if name.endswith(".pt")} == {
            f"global_step0/mp_rank_0{rank}_model_states.pt" for rank in (0, 1)
        }
        assert json.loads(after["artifact.json"])["config"]["parallel"]["tensor"] == 2
    assert after["artifact.json"] != visible["artifact.json"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_foreign_folder_where_a_replacement_is_made(base: Path, tmp_path: Path, overwrite: bool) -> None:
    target = tmp_path / "target"
    (target / ".incoming").mkdir(parents=True)
    (target / ".incoming/thesis.tex").write_text("mine")
    with pytest.raises(CheckpointError, match=r"target/\.incoming, .* holds thesis\.tex, which llemma convert did not"):
        convert_to(base, target, overwrite=overwrite)
    assert contents(target) == {".incoming/thesis.tex": b"mine"}


@pytest.mark.parametrize("moment", ["while it is made", "while it takes the place"])
def test_what_a_killed_replacement_leaves_is_our_own(
    base: Path, tmp_path: Path, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "neox"
    convert_to(base, target)

    def stop(*arguments: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        place = {
            "while it is made": "neox_core.checkpoint.conversion.proof.prove_conversion",
            "while it takes the place": "neox_core.storage.targets.LocalTarget.clear_beside",
        }[moment]
        patch.setattr(place, stop)
        if moment == "while it takes the place":
            moved = LocalTarget.take_over
            patch.setattr(LocalTarget, "take_over", lambda self, path: moved(self, path) if path[0] == "." else stop())
        with pytest.raises(KeyboardInterrupt):
            convert_to(base, target, tensor=2)
    assert contents(target / ".incoming")
    convert_to(base, target, tensor=2)
    assert not (target / ".incoming").exists()
    assert (target / "global_step0/mp_rank_01_model_states.pt").is_file()


def test_a_killed_attempt_is_our_own(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that was finished but not noted yet."""

    def stop(share: float, text: str) -> None:
        raise KeyboardInterrupt

    target = tmp_path / "neox"
    with pytest.raises(KeyboardInterrupt):
        convert_folder(str(base), str(target), ParallelConfig(tensor=2), 1, stop)
    (target / "global_step0").mkdir(exist_ok=True)
    (target / "global_step0/mp_rank_01_model_states.pt").write_bytes(b"half")
    convert_to(base, target, tensor=2)
    assert (target / "latest").read_text() == "global_step0"


def test_a_finished_result_may_get_a_readme(base: Path, tmp_path: Path) -> None:
    target = tmp_path / "neox"
    convert_to(base, target)
    (target / "README.md").write_text("ours")
    before = contents(target)
    convert_to(base, target)
    assert contents(target) == before


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_what_was_changed_since_is_not_our_own(base: Path, tmp_path: Path, name: str) -> None:
    """Another model that was saved over an export, an edited config.json."""
    target = tmp_path / "target"
    convert_to(base, tmp_path / "neox")
    export_to(tmp_path / "neox", target)
    changed = (target / name).read_bytes() + b" "
    (target / name).write_bytes(changed)
    message = rf"target holds {name}, changed since llemma export wrote it: .*--overwrite"
    for form in ("huggingface", "meta"):
        with pytest.raises(CheckpointError, match=message):
            export_to(tmp_path / "neox", target, form)
    assert (target / name).read_bytes() == changed
    export_to(tmp_path / "neox", target, overwrite=True)
    assert (target / name).read_bytes() != changed


def test_an_object_store(base: Path, tmp_path: Path, store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", store.endpoint)
    place = f"{store.url()}run#1"
    convert_to(base, place)
    assert store.get_text("run#1/latest") == "global_step0"
    store.put_text("run#1/notes.txt", "mine")
    convert_to(base, place)  # finished
    with pytest.raises(CheckpointError, match=r"run#1 holds notes\.txt, which llemma convert did not write"):
        convert_to(base, place, tensor=2)
    convert_to(base, place, tensor=2, overwrite=True)
    keys = [info.key for info in store.list("run#1/") if "/." not in info.key]
    assert keys == [
        "run#1/artifact.json",
        *(f"run#1/global_step0/mp_rank_0{rank}_model_states.pt" for rank in (0, 1)),
        "run#1/latest",
        "run#1/notes.txt",
    ]
    assert not store.list("run#1/.incoming/")


def test_places_that_cannot_be_written_to(base: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for target, message in (
        (tmp_path / "file", "is a file: name a folder"),
        (tmp_path / "file/below", r"(is a file|Not a directory)"),
        (tmp_path / ("x" * 300), "File name too long"),
        (Path("/proc/nothing"), "cannot be written"),
    ):
        with pytest.raises(StorageError, match=message):
            convert_to(base, target)
    for empty in ("", "  "):
        with pytest.raises(ConfigError, match="--to is empty"):
            convert_to(base, empty)
    with pytest.raises(ConfigError, match="it is empty"):
        convert_folder("", str(tmp_path / "x"), ParallelConfig(), 1, silent)


def test_special_ids_are_the_bases(base: Path, tmp_path: Path) -> None:
    """Hugging Face -> NeoX -> Hugging Face keeps lists of ids and the settings of generation; Meta's base has none."""
    convert_to(base, tmp_path / "neox")
    export_to(tmp_path / "neox", tmp_path / "hf")
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert [config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")] == [None, None, None]
    ids = {"bos_token_id": 30, "eos_token_id": [31, 32], "pad_token_id": 33}
    generation = {"eos_token_id": [31, 34], "temperature": 0.6, "do_sample": True}
    shutil.copytree(tmp_path / "hf", tmp_path / "own")
    (tmp_path / "own/config.json").write_text(json.dumps(config | ids))
    (tmp_path / "own/generation_config.json").write_text(json.dumps(generation))
    convert_to(tmp_path / "own", tmp_path / "again")
    export_to(tmp_path / "again", tmp_path / "back")
    found = json.loads((tmp_path / "back/config.json").read_text())
    assert {key: found[key] for key in ids} == ids
    assert json.loads((tmp_path / "back/generation_config.json").read_text()) == generation


def test_what_an_export_changes_in_config_json_is_said(base: Path, tmp_path: Path) -> None:
    """Of every field, also of those that only one of both has."""
    convert_to(base, tmp_path / "neox")
    first = export_to(tmp_path / "neox", tmp_path / "hf")
    assert "changes_in_config.json" not in first.summary  # Meta's base has none
    path = tmp_path / "hf/config.json"
    config = json.loads(path.read_text()) | {"bos_token_id": 30}
    same = {**config, "rope_theta": int(config["rope_theta"])}
    other = {**config, "attention_dropout": 0.1, "task_specific_params": {"x": 1}, "use_cache": False}
    del other["pretraining_tp"]
    results = []
    for number, content in enumerate((same, other)):
        path.write_text(json.dumps(content))
        convert_to(tmp_path / "hf", tmp_path / f"neox{number}")
        results.append(export_to(tmp_path / f"neox{number}", tmp_path / f"hf{number}"))
    assert [result.summary["changes_in_config.json"] for result in results] == [
        "none",
        "attention_dropout 0.0 (base: 0.1), pretraining_tp 1 (base: absent), "
        'task_specific_params absent (base: {"x": 1}), use_cache true (base: false)',
    ]
    assert results[0].fingerprint == results[1].fingerprint  # an export of before is not made again


def test_long_values_differ_at_their_ends() -> None:
    base, exported = ({"no_rope_layers": [1] * 60 + [end]} for end in (0, 1))
    assert config_differences(base, exported).startswith("no_rope_layers [1, 1,")


def test_the_fingerprint_is_of_the_models_files(base: Path, tmp_path: Path) -> None:
    first = convert_to(base, tmp_path / "neox")
    shutil.copy(base / "consolidated.00.pth", base / "consolidated.00 (1).pth")
    torch.save({}, base / "._consolidated.00.pth")
    (base / "README.md").write_text("about")
    again = convert_to(base, tmp_path / "neox")
    assert again.fingerprint == first.fingerprint
    assert set(first.inputs) == {"params.json", "consolidated.00.pth", "consolidated.01.pth"}


def test_a_tokenizer_is_a_file_or_its_folder_with_all_that_belongs_to_it(tmp_path: Path) -> None:
    make_random_base(MODEL.model_copy(update={"vocab_size": 304}), tmp_path / "base", seed=3)
    convert_to(tmp_path / "base", tmp_path / "neox")
    tokenizer, target = tmp_path / "tokenizer", tmp_path / "hf"
    tokenizer.mkdir()

    def export(path: Path) -> None:
        export_folder(str(tmp_path / "neox"), str(target), "huggingface", None, 1, path, 64, silent)

    with pytest.raises(CheckpointError, match=r"holds neither tokenizer\.model nor tokenizer\.json: give one of"):
        export(tokenizer)
    with pytest.raises(CheckpointError, match="other does not exist: give one of"):
        export(tmp_path / "other")
    make_byte_level(tokenizer)
    template = tokenizer / "chat_template.jinja"
    for text in ("first", "second"):  # by which the export is another one, and is made again
        template.write_text(text)
        export(tokenizer)
        assert (target / template.name).read_text() == text
    assert (target / "tokenizer.json").read_bytes() == (tokenizer / "tokenizer.json").read_bytes()
