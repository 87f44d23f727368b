"""One file's part: every record accounted for, bad ones listed, damaged files named or left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from neox_core.data.indexed import IndexedDataset
from neox_core.data.tokenization import part, part_files
from neox_core.data.tokenization.filters.overlap import OverlapWords
from neox_core.data.tokenization.part import make_part
from neox_core.data.tokenization.part_files import PartPaths, load_signatures, load_table
from neox_core.data.tokenization.part_settings import Done, PartSettings, TokenizerSettings
from neox_core.data.tokenization.readers import InputFile, WrongColumnError
from neox_core.data.tokenization.tokenizer import Tokenizer
from neox_core.errors import DataError

MODEL = Path("data/tokenizers/demo-2048.model").resolve()
GOOD = ["first text", "</s> literal <s>", "x", "last"]


def settings(**changes: Any) -> PartSettings:
    values: dict[str, Any] = {
        "tokenizer": TokenizerSettings(MODEL),
        "storage": None,
        "overlap": OverlapWords(3, 3),
    }
    return PartSettings(**values | changes)


def input_file(path: Path, lines: list[str], split: str = "train") -> InputFile:
    path.write_text("\n".join(lines))
    return InputFile("a", split, path.name, str(path), path.stat().st_size)


def record(text: object) -> str:
    return json.dumps({"text": text})


def listed(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_bad_records_are_listed_and_good_ones_kept(tmp_path: Path) -> None:
    lines = [record(GOOD[0]), "{", "", record(GOOD[1]), record(7), record(GOOD[2]), "[]", record(GOOD[3])]
    file = input_file(tmp_path / "x.jsonl", lines)
    made = make_part(file, settings(), tmp_path)
    paths = PartPaths.of(file, tmp_path)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(MODEL))
    dataset = IndexedDataset(paths.prefix)
    expected = [[*reference.encode(text), reference.eos_id()] for text in GOOD]
    assert [dataset[i].tolist() for i in range(len(dataset))] == expected
    assert (made.documents, made.rejected) == (4, 3)
    assert (made.bytes, made.tokens) == (sum(map(len, GOOD)), sum(map(len, expected)))
    assert [(line["line"], line["reason"][:9]) for line in listed(paths.rejected)] == [
        (2, "it is not"),
        (5, 'its "text'),
        (7, "it is a l"),
    ]
    table = load_table(paths)
    assert table["line"].tolist() == [1, 4, 6, 8]
    assert table["bytes"].tolist() == [len(text) for text in GOOD]
    assert len(load_signatures(paths)) == 0  # not asked for


def test_damaged_file_fails_or_is_left_out_as_a_whole(tmp_path: Path) -> None:
    file = input_file(tmp_path / "x.jsonl.zst", [record("fine")])
    made = make_part(file, settings(), tmp_path / "out")
    paths = PartPaths.of(file, tmp_path / "out")
    assert (made.documents, made.rejected, made.tokens, len(IndexedDataset(paths.prefix))) == (0, 0, 0, 0)
    assert "it is plain text, not zstd" in made.damaged
    (line,) = listed(paths.rejected)
    assert line["line"] is None
    assert line["reason"].startswith("the file is damaged and left out: ")
    # found again, but for a run that does not skip, which tries it again
    place = paths.record.stat().st_ino
    assert make_part(file, settings(skip_damaged_files=True), tmp_path / "out") == made
    assert paths.record.stat().st_ino == place
    assert make_part(file, settings(), tmp_path / "out") == made
    assert paths.record.stat().st_ino != place


def test_empty_documents_are_dropped_and_counted(tmp_path: Path) -> None:
    file = input_file(tmp_path / "x.jsonl", [record(text) for text in ("", "one", " \n\t\u00a0", "two")])
    made = make_part(file, settings(signatures=True), tmp_path / "out")
    assert (made.documents, made.empty, made.rejected) == (2, 2, 0)
    paths = PartPaths.of(file, tmp_path / "out")
    assert load_table(paths)["line"].tolist() == [2, 4]
    assert len(IndexedDataset(paths.prefix)) == len(load_signatures(paths)) == 2


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_an_empty_file_is_whole(tmp_path: Path, content: str) -> None:
    file = input_file(tmp_path / "x.jsonl", [content])
    made = make_part(file, settings(), tmp_path / "out")
    assert (made.documents, made.empty, made.rejected, made.damaged) == (0, 0, 0, "")


def test_switching_skip_damaged_files_keeps_good_parts(tmp_path: Path) -> None:
    file = input_file(tmp_path / "x.jsonl", [record("fine")])
    kept = []
    for skip in (False, True, False):
        make_part(file, settings(skip_damaged_files=skip), tmp_path / "out")
        kept.append(PartPaths.of(file, tmp_path / "out").documents.stat().st_ino)
    assert len(set(kept)) == 1


def test_progress_of_a_part_but_not_of_one_that_is_found(tmp_path: Path) -> None:
    file = input_file(tmp_path / "x.jsonl", [record("some words " * 100)] * 1000)
    reported: list[Done] = []
    made = make_part(file, settings(), tmp_path, reported.append)
    assert reported == sorted(reported)
    assert 0 < reported[1].stored < file.size
    assert 0 < reported[1].bytes < made.bytes
    assert reported[-1] == (file.size, made.bytes, made.tokens)
    reported.clear()
    assert make_part(file, settings(), tmp_path, reported.append) == made
    assert reported == []


def test_who_demands_sentencepiece_gets_no_part_of_another_engine(tmp_path: Path) -> None:
    file = input_file(tmp_path / "x.jsonl", [record("some text")])
    assert make_part(file, settings(), tmp_path).engine.startswith("gigatoken")
    demanded = settings(tokenizer=TokenizerSettings(MODEL, engine="sentencepiece"))
    assert make_part(file, demanded, tmp_path).engine.startswith("sentencepiece")
    assert make_part(file, settings(), tmp_path).engine.startswith("sentencepiece")  # the same ids


def test_errors_of_files_name_the_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = input_file(tmp_path / "x.jsonl", [record("some text")])
    (tmp_path / "x.jsonl").unlink()
    with pytest.raises(DataError, match=r"x\.jsonl cannot be made a part of: .*No such file.*run again"):
        make_part(file, settings(), tmp_path)
    file = input_file(tmp_path / "x.jsonl", [record("some text")])

    def fetched(path: Path, *others: Any) -> Any:
        raise WrongColumnError("/tmp/fetched/x.parquet", "has no column 'text', only body")

    monkeypatch.setattr(part, "read_records", fetched)
    with pytest.raises(DataError, match=rf"^{file.location} has no column 'text', only body: correct data.text_key"):
        make_part(file, settings(), tmp_path)


def test_one_wrong_id_fails_the_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = input_file(tmp_path / "x.jsonl", [record(text) for text in GOOD])
    original = Tokenizer.encode_document
    monkeypatch.setattr(Tokenizer, "encode_document", lambda self, text: original(self, text[:-1] + "?"))
    with pytest.raises(DataError, match=r"x\.jsonl, line 1: gigatoken .* and SentencePiece differ from token"):
        make_part(file, settings(), tmp_path / "out")
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


def test_share_of_the_text_that_is_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(part_files, "_VERIFY_ONE_IN", 10)
    file = input_file(tmp_path / "x.jsonl", [record("ten bytes!")] * 100)
    assert make_part(file, settings(), tmp_path).verified == 10


def test_tokenizer_is_read_again_when_it_changes(tmp_path: Path) -> None:
    model = tmp_path / "m.model"
    model.write_bytes(MODEL.read_bytes())
    file = input_file(tmp_path / "x.jsonl", [record("text")])
    changed = settings(tokenizer=TokenizerSettings(model))
    make_part(file, changed, tmp_path / "out")
    part._tokenizer.cache_clear()
    model.write_bytes(b"broken")
    with pytest.raises(DataError, match="is not a SentencePiece model"):
        make_part(file, changed, tmp_path / "out")


@pytest.mark.parametrize("split", ["train", "validation"])
def test_overlaps_are_listed_for_training_text_only(tmp_path: Path, split: str) -> None:
    evaluation = tmp_path / "eval.jsonl"
    evaluation.write_text(json.dumps({"id": "q7", "question": "How many eggs are there?"}) + "\n")
    texts = ["nothing", "He asked: how many EGGS, then", "how many"]
    file = input_file(tmp_path / "x.jsonl", [record(text) for text in texts], split)
    make_part(file, settings(evaluation_sets=(evaluation,)), tmp_path)
    found = {"set": 0, "item": "q7", "field": "question", "document": 1, "line": 2}
    expected = [{**found, "words": 3, "text": "how many eggs"}] if split == "train" else []
    assert listed(PartPaths.of(file, tmp_path).overlaps) == expected
