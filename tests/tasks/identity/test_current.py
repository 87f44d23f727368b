"""Later stages follow records of what is current; raw inputs count when their own stage is run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from neox_core.artifact import Artifact, read_artifact
from neox_core.config import RunConfig, TrainChange
from neox_core.data.tokenization.tokenizer_file import tokenizer_in
from neox_core.errors import ConfigError, DataError, LlemmaError
from neox_core.progress import silent
from tasks import preflight
from tasks.export import sample_texts
from tasks.identity.current import current, find_current, note_current, outlived
from tasks.identity.stage import StageResult
from tasks.identity.training import find_training, resolve_training
from tasks.preflight import check_run
from tasks.prepare import prepare
from tests.tasks.identity.test_specs import changed, small_config

WORDS = "Let the group be a ring. "


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    """Of texts that are long enough for a sequence each; the convert stage counts as run."""
    config = small_config(tmp_path)
    for path in Path(config.data.input).rglob("*.jsonl"):
        path.write_text(json.dumps({"text": f"{path.parent} {WORDS * 200}"}))
    config = changed(config, "data.max_epochs", 1e6)
    shards = Artifact("convert", "c" * 64, {}, config.model_dump(mode="json"), (), {})
    note_current(config, StageResult(shards, skipped=False))
    monkeypatch.setattr(preflight, "check_launch", lambda launch: None)
    return config


def edit(config: RunConfig) -> None:
    path = Path(config.data.input) / "code" / "train" / "0.jsonl"
    path.write_text(path.read_text() + "\n" + json.dumps({"text": "more"}))


def test_an_edited_text_changes_nothing_until_prepare_data_is_run_again(config: RunConfig) -> None:
    first = prepare(config, silent)
    training = resolve_training(config)
    assert training.data.folder == first.artifact.folder
    edit(config)
    assert resolve_training(config) == training
    second = prepare(config, silent)
    assert not second.skipped
    assert resolve_training(config).data.fingerprint == second.artifact.fingerprint != first.artifact.fingerprint
    assert resolve_training(config).fingerprint != training.fingerprint
    assert training.data.folder == first.artifact.folder  # what was resolved before stays what it was


def test_the_same_configuration_with_test_splits_has_a_record_of_its_own(config: RunConfig) -> None:
    """Else it would hide the training of the one without."""
    first = prepare(config, silent)
    training, with_test = resolve_training(config), changed(config, "data.test", True)
    path = Path(config.data.input) / "code" / "test" / "0.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"text": WORDS * 200}))
    second = prepare(with_test, silent)
    assert second.artifact.fingerprint != first.artifact.fingerprint
    assert resolve_training(config) == training
    assert resolve_training(with_test).data.fingerprint == second.artifact.fingerprint


def test_taking_an_edit_back_finds_the_old_training(config: RunConfig) -> None:
    prepare(config, silent)
    training, path = resolve_training(config), Path(config.data.input) / "code" / "train" / "0.jsonl"
    before = path.read_text()
    edit(config)
    prepare(config, silent)
    path.write_text(before)
    assert prepare(config, silent).skipped
    assert resolve_training(config) == training


def test_raw_inputs_that_are_gone(config: RunConfig, caplog: pytest.LogCaptureFixture) -> None:
    made = prepare(config, silent)
    shutil.rmtree(config.data.input)
    config.tokenizer.model.unlink()
    again = prepare(config, silent)
    assert (again.skipped, again.artifact) == (True, made.artifact)
    assert f"{config.data.input} does not exist any more: prepare-data stays what it was" in caplog.text
    check_run(config, ["prepare-data", "train"])
    texts = sample_texts(made.artifact.folder, tokenizer_in(made.artifact.folder), config)
    assert sorted(text.split()[0].split("/")[-2] for text in texts) == sorted(config.data.sources)
    assert all(text.endswith(WORDS) for text in texts)


def test_raw_inputs_that_are_gone_before_or_whose_artifact_is_damaged(config: RunConfig) -> None:
    text = Path(config.data.input)
    text.rename(text.with_name("elsewhere"))
    with pytest.raises(DataError, match=r"data\.input .* is not a folder"):
        prepare(config, silent)
    text.with_name("elsewhere").rename(text)
    artifact = prepare(config, silent).artifact
    shutil.rmtree(text)
    (artifact.folder / artifact.files[0].path).unlink()
    assert outlived(config, "prepare-data") is None
    with pytest.raises(DataError, match=r"data\.input .* is not a folder"):
        check_run(config, ["prepare-data"])


def test_a_partly_removed_text_is_another_text_or_an_error(config: RunConfig) -> None:
    prepare(config, silent)
    shutil.rmtree(Path(config.data.input) / "code" / "train")
    with pytest.raises(DataError, match="source 'code' has no train text"):
        prepare(config, silent)


def test_an_artifact_without_the_tokenizers_copy_is_made_again(config: RunConfig) -> None:
    folder = prepare(config, silent).artifact.folder
    record = json.loads((folder / "artifact.json").read_text())
    record["files"] = [file for file in record["files"] if file["path"] != "tokenizer.model"]
    (folder / "artifact.json").write_text(json.dumps(record))
    (folder / "tokenizer.model").unlink()
    assert not prepare(config, silent).skipped
    assert (folder / "tokenizer.model").read_bytes() == config.tokenizer.model.read_bytes()
    assert "tokenizer.model" in {file.path for file in read_artifact(folder).files}


@pytest.mark.parametrize(
    ("key", "value", "shared"),
    [
        ("train.steps", 50, True),
        ("train.changes", (TrainChange(from_step=9, lr=1e-4),), True),
        ("data.workers", 3, True),
        ("data.deduplicate", True, False),
        ("data.input", "elsewhere", False),
        ("tokenizer.model", Path("elsewhere"), False),
    ],
)
def test_whose_record_it_is(config: RunConfig, key: str, value: Any, shared: bool) -> None:
    identity = prepare(config, silent).artifact.fingerprint
    other = changed(config, key, value)
    found = find_current(other, "prepare-data")
    assert (found.fingerprint if found else None) == (identity if shared else None)


def test_the_ancestors_share_the_artifacts(config: RunConfig) -> None:
    prepare(config, silent)
    plain = resolve_training(config)
    later = resolve_training(changed(config, "train.changes", (TrainChange(from_step=9, lr=1e-4),)))
    before, *named_after_shards = later.ancestors
    assert (before.fingerprint, before.last_step) == (plain.fingerprint, 8)
    assert [ancestor.last_step for ancestor in named_after_shards] == [later.config.train.steps, 8]


def test_before_the_stages_were_run(config: RunConfig) -> None:
    assert find_training(config) is None
    message = r"stage prepare-data was never finished in .*: run it first, with `llemma run CONFIG prepare-data`"
    for ask in (lambda: current(config, "prepare-data"), lambda: check_run(config, ["train"])):
        with pytest.raises(LlemmaError, match=message):
            ask()


def test_another_seed_is_another_base(config: RunConfig) -> None:
    shutil.rmtree(config.base_model.path)
    other = changed(config, "base_model.random_seed", 7)
    assert find_current(config, "convert") is not None
    assert find_current(other, "convert") is None
    check_run(other, ["convert"])  # can be made
    with pytest.raises(ConfigError, match=r"holds no params\.json"):
        check_run(changed(config, "base_model.random_seed", None), ["convert"])
