"""prepare-data as a stage: finished parts outlive interruptions and corrections, and runs in one workdir."""

from __future__ import annotations

import json
import shutil
import threading
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from neox_core.artifact import publish
from neox_core.config import RunConfig
from neox_core.data.tokenization.tokenizer_file import companions
from neox_core.errors import DataError
from neox_core.progress import silent
from neox_core.storage import claims
from neox_core.storage.claims import claim
from tasks.identity import once
from tasks.prepare import prepare
from tasks.tokenization import tokenize
from tests.byte_level import END, make_byte_level
from tests.meanwhile import meanwhile
from tests.tasks.tokenization.test_tokenize import FILES, contents, small, small_input

PATIENCE = 300.0


def run_config(tmp_path: Path, workdir: str = "work", **data: Any) -> RunConfig:
    """Of the text in tmp_path / "in"."""
    return small(tmp_path / "in", **data).model_copy(update={"workdir": tmp_path / workdir})


def with_unk(config: RunConfig) -> RunConfig:
    """Ends documents in <unk>, which gives as many ids."""
    tokenizer = config.tokenizer.model_copy(update={"end_of_document": "unk"})
    return config.model_copy(update={"tokenizer": tokenizer})


def parts(tmp_path: Path) -> dict[str, int]:
    """Inode of each part's table of documents."""
    home = tmp_path / "work" / ".parts"
    return {path.relative_to(home).as_posix(): path.stat().st_ino for path in home.rglob("*.documents.npy")}


def interrupted(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run up to where all is merged and artifact.json is missing."""

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(once, "publish", killed)
        with pytest.raises(KeyboardInterrupt):
            prepare(config, silent)


def test_parts_outlive_a_kill_before_the_artifact_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_input(tmp_path / "in", FILES)
    config = run_config(tmp_path)
    interrupted(config, monkeypatch)
    made = parts(tmp_path)
    assert len(made) == len(FILES) - 1  # no stage reads the test split
    interrupted(config, monkeypatch)
    assert parts(tmp_path) == made
    result = prepare(config, silent)
    assert {record.path for record in result.artifact.files} == {
        f"{split}{end}" for split in ("a/train", "a/validation", "b/train") for end in (".bin", ".idx")
    } | {"tokenizer.model", "in_validation.jsonl"}
    assert not list((tmp_path / "work").glob(".parts*"))
    assert not list(result.artifact.folder.rglob(".*"))


def test_what_belongs_to_a_tokenizer_json_lies_among_the_token_files(tmp_path: Path) -> None:
    small_input(tmp_path / "in", FILES)
    tokenizer = make_byte_level(tmp_path / "base")
    tokenizer.with_name("tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    tokenizer.with_name("chat_template.jinja").write_text("{{ messages }}")
    config = run_config(tmp_path)
    section = config.tokenizer.model_copy(update={"model": tokenizer.parent, "end_of_document": END})
    folder = prepare(config.model_copy(update={"tokenizer": section}), silent).artifact.folder
    shutil.rmtree(tokenizer.parent)
    assert sorted(path.name for path in companions(folder / "tokenizer.model")) == [
        "chat_template.jinja",
        "tokenizer_config.json",
    ]


def test_characters_without_an_id_are_named_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    small_input(tmp_path / "in", FILES)
    tokenizer = make_byte_level(tmp_path / "base")
    lost = "\u0104"  # how byte-level BPE writes the byte 4
    tokenizer.write_text(tokenizer.read_text().replace(f'"{lost}"', '"another"'))
    config = run_config(tmp_path)
    section = config.tokenizer.model_copy(update={"model": tokenizer, "end_of_document": END})
    prepare(config.model_copy(update={"tokenizer": section}), silent)
    said = [record.getMessage() for record in caplog.records if "has no ids" in record.getMessage()]
    assert said == ["the tokenizer has no ids for ['\\x04']: they are left out of texts, as everywhere"]


def test_what_an_interrupted_removal_left_goes_with_the_next_run(tmp_path: Path) -> None:
    small_input(tmp_path / "in", FILES)
    prepare(run_config(tmp_path), silent)
    (tmp_path / "work" / ".parts-done-0" / "a").mkdir(parents=True)
    assert prepare(run_config(tmp_path), silent).skipped
    assert not list((tmp_path / "work").glob(".parts*"))


def test_corrections_that_errors_advise_keep_finished_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = small_input(tmp_path / "in", FILES)
    bad, damaged = folder / "a/validation/0.jsonl", folder / "a/train/9.jsonl.zst"
    bad.write_text(json.dumps({"text": "fine " * 300}) + '\n{"txet": "bad"}\n')
    damaged.write_text("not zstd")  # the smallest, so that all others are made before it
    with pytest.raises(DataError, match=r"1 of \d files is damaged"):
        prepare(run_config(tmp_path), silent)
    with pytest.raises(DataError, match="1 of 5 records are bad"):
        prepare(run_config(tmp_path, skip_damaged_files=True), silent)
    made = parts(tmp_path)
    assert len(made) == len(FILES)
    interrupted(run_config(tmp_path, skip_damaged_files=True, max_rejected=0.9), monkeypatch)
    assert parts(tmp_path) == made
    damaged.unlink()
    (folder / "a/train/9.jsonl").write_text('{"text": "a good copy"}\n')
    interrupted(run_config(tmp_path, max_rejected=0.9), monkeypatch)
    assert made.items() <= parts(tmp_path).items()
    summary = prepare(run_config(tmp_path, max_rejected=0.9), silent).artifact.summary
    assert summary["accounting"]["documents_in"] == 7
    assert summary["damaged_files"] == []
    assert not list((tmp_path / "work").glob(".parts*"))


def test_a_file_that_was_left_out_is_not_when_that_is_switched_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = small_input(tmp_path / "in", FILES)
    (folder / "a/train/9.jsonl.zst").write_text("not zstd")
    interrupted(run_config(tmp_path, skip_damaged_files=True), monkeypatch)
    with pytest.raises(DataError, match=r"1 of \d files is damaged"):
        prepare(run_config(tmp_path), silent)


def test_configurations_in_one_workdir_do_not_mix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_input(tmp_path / "in", FILES)
    ours = run_config(tmp_path)
    interrupted(ours, monkeypatch)
    for config in (with_unk(ours), ours):
        alone = prepare(config.model_copy(update={"workdir": tmp_path / "alone"}), silent).artifact
        found = prepare(config, silent).artifact
        assert found.files == alone.files
        assert contents(found.folder).keys() == contents(alone.folder).keys()


def test_runs_in_one_workdir_take_turns_and_a_finished_one_does_not_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "_CLAIM_SECONDS", 0.01)
    small_input(tmp_path / "in", FILES)
    finished = run_config(tmp_path)
    prepare(finished, silent)
    waiting = threading.Event()

    def report(share: float, text: str) -> None:
        if "another run is at work on the parts of this workdir" in text:
            waiting.set()

    with ExitStack() as held:
        held.enter_context(claim(tmp_path / "work", "prepare-data-parts", "", silent))
        assert prepare(finished, silent).skipped
        with meanwhile(partial(prepare, with_unk(finished), report)):
            assert waiting.wait(PATIENCE)
            assert not (tmp_path / "work" / ".parts").exists()
            held.close()
    assert prepare(with_unk(finished), silent).skipped


def test_the_parts_are_this_runs_until_the_artifact_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_input(tmp_path / "in", FILES)
    held = []

    def publish_and_look(*arguments: Any) -> Any:
        with claims.try_claim_name(tmp_path / "work", "prepare-data-parts") as claimed:
            held.append(not claimed)
        return publish(*arguments)

    monkeypatch.setattr(once, "publish", publish_and_look)
    prepare(run_config(tmp_path), silent)
    assert held == [True]


def test_parts_that_were_replaced_while_they_were_merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a job that outlived an earlier run may do."""
    small_input(tmp_path / "in", FILES)
    merge_split = tokenize.merge_split

    def replaced(*arguments: Any) -> None:
        merge_split(*arguments)
        path = tmp_path / "work/.parts/a/train/1.jsonl.json"
        record = json.loads(path.read_text())
        path.write_text(json.dumps(record | {"sha256": {"1.jsonl.bin": "0"}}))

    monkeypatch.setattr(tokenize, "merge_split", replaced)
    with pytest.raises(DataError, match=r"a/train/1\.jsonl was replaced while it was merged: end the other run"):
        prepare(run_config(tmp_path), silent)
