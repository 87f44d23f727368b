"""prepare-data on the demo's real text: ids are SentencePiece's, restartable, the same for any number of workers."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import zstandard

from neox_core.artifact import DigestCache, sha256_of
from neox_core.config import RunConfig, TokenizerConfig, load_config
from neox_core.errors import ConfigError, DataError
from tasks.tokenize import InputFile, checked_inputs, input_digests, prepare_data, tokenize_file

INPUT = Path("data/tiny-proof-pile")


def toy(input_folder: Path = INPUT, **data: Any) -> RunConfig:
    base = load_config("configs/toy.yml")
    sources = {"arxiv": {"weight": 2}, "open-web-math": {"weight": 4}}
    content = {"input": input_folder, "sources": sources, "eval_sources": ["open-web-math"], "workers": 1} | data
    return base.model_copy(update={"data": type(base.data).model_validate(content)})


def texts_of(folder: Path) -> list[str]:
    """Read independently: whole files, through another interface of zstandard."""
    texts = []
    for path in sorted(folder.glob("*.zst")):
        with path.open("rb") as raw, zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True) as reader:
            lines = io.TextIOWrapper(reader, encoding="utf-8", newline="\n")
            texts += [json.loads(line)["text"] for line in lines]
    return texts


def documents_of(prefix: Path) -> list[list[int]]:
    """Read independently: u16 ids by struct."""
    index, data = prefix.with_suffix(".idx").read_bytes(), prefix.with_suffix(".bin").read_bytes()
    assert index[17] == 8
    (count,) = struct.unpack_from("<Q", index, 18)
    sizes = struct.unpack_from(f"<{count}i", index, 34)
    offsets = struct.unpack_from(f"<{count}q", index, 34 + 4 * count)
    assert sum(sizes) * 2 == len(data)
    return [list(struct.unpack_from(f"<{size}H", data, at)) for size, at in zip(sizes, offsets, strict=True)]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("prepared")
    return folder, prepare_data(toy(), folder)


def test_every_id_is_sentencepieces(prepared: tuple[Path, dict[str, Any]]) -> None:
    folder, ledger = prepared
    reference = sentencepiece.SentencePieceProcessor(model_file="data/tokenizers/demo-2048.model")
    splits = [("arxiv", "train"), *(("open-web-math", split) for split in ("train", "validation", "test"))]
    assert sorted(contents(folder)) == sorted(f"{s}/{split}{end}" for s, split in splits for end in (".bin", ".idx"))
    for source, split in splits:
        texts = texts_of(INPUT / source / split)
        expected = [[*reference.encode(text), reference.eos_id()] for text in texts]
        assert len(texts) > 0
        assert documents_of(folder / source / split) == expected
        assert ledger["sources"][source][split] == {
            "documents": len(texts),
            "bytes": sum(len(text.encode()) for text in texts),
            "tokens": sum(map(len, expected)),
        }


def test_ledger_of_the_run(prepared: tuple[Path, dict[str, Any]]) -> None:
    _, ledger = prepared
    assert set(ledger["sources"]["arxiv"]) == {"train"}
    run = ledger["run"]
    assert run["arxiv"]["sequences"] + run["open-web-math"]["sequences"] == 1600
    assert run["arxiv"]["share"] == run["arxiv"]["sequences"] / 1600 == pytest.approx(1 / 3, abs=1 / 1600)
    json.dumps(ledger, allow_nan=False)


def test_two_workers_give_the_same_bits_and_progress(prepared: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    seen: list[tuple[float, str]] = []
    ledger = prepare_data(toy(workers=2), tmp_path, lambda share, text: seen.append((share, text)))
    assert ledger == prepared[1]
    assert contents(tmp_path) == contents(prepared[0])
    assert seen[0] == (0.0, "0 of 7 files")
    assert seen[-1][0] == 1.0
    assert seen[-1][1].startswith("7 of 7 files, ")
    assert seen[-1][1].endswith(" MB/s")
    assert [share for share, _ in seen] == sorted(share for share, _ in seen)


def test_seed_option_ends_documents_in_unk(tmp_path: Path) -> None:
    config = toy()
    tokenizer = config.tokenizer.model_copy(update={"end_of_document": "unk"})
    file = InputFile("arxiv", "train", INPUT / "arxiv/train/arXiv_000.jsonl.zst")
    record = tokenize_file(file, tokenizer, tmp_path)
    part = file.part(tmp_path)
    ends = [document[-1] for document in documents_of(part.with_name(part.name + ".x"))]
    assert ends == [0] * record.documents


def small_input(folder: Path, files: dict[str, list[str]]) -> Path:
    for name, texts in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder


def small(folder: Path, **data: Any) -> RunConfig:
    sources = {"a": {"weight": 1}, "b": {"weight": 0}}
    return toy(folder, **({"sources": sources, "eval_sources": ["a"], "max_epochs": 1e6} | data))


WORDS = ["word " * 400, "</s> literal <s>"]
FILES = {f"a/{split}/0.jsonl": WORDS for split in ("train", "validation", "test")} | {
    "a/train/1.jsonl": ["more text"],
    "b/train/0.jsonl": ["x"],
}


def test_killed_call_resumes_with_the_missing_parts(tmp_path: Path) -> None:
    config = small(small_input(tmp_path / "in", FILES))
    files = checked_inputs(config)
    prepare_data(config, tmp_path / "whole")
    # As a kill leaves it: one part whole, one without its record, a temporary file.
    done, half = files[0].part(tmp_path / "out"), files[1].part(tmp_path / "out")
    tokenize_file(files[0], config.tokenizer, tmp_path / "out")
    tokenize_file(files[1], config.tokenizer, tmp_path / "out")
    half.with_name(half.name + ".json").unlink()
    half.with_name(half.name + ".bin").write_bytes(b"half")
    (tmp_path / "out" / "a").mkdir()
    (tmp_path / "out" / "a" / ".train.bin.0123.tmp").write_bytes(b"half")
    kept = done.with_name(done.name + ".bin").stat().st_ino
    tokenize_file(files[0], config.tokenizer, tmp_path / "out")
    assert done.with_name(done.name + ".bin").stat().st_ino == kept
    prepare_data(config, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("change", ["text", "tokenizer option", "truncated part"])
def test_part_of_other_input_is_not_reused(tmp_path: Path, change: str) -> None:
    config = small(small_input(tmp_path / "in", FILES))
    file, tokenizer = checked_inputs(config)[0], config.tokenizer
    tokenize_file(file, tokenizer, tmp_path)
    part_bin = file.part(tmp_path).with_name(file.path.name + ".bin")
    before = part_bin.read_bytes()
    if change == "text":
        file.path.write_text(json.dumps({"text": "other"}) + "\n")
    elif change == "tokenizer option":
        tokenizer = TokenizerConfig(model=tokenizer.model, end_of_document="unk")
    else:
        part_bin.write_bytes(before[:-2])
    tokenize_file(file, tokenizer, tmp_path)
    assert (part_bin.read_bytes() == before) == (change == "truncated part")


def test_bad_record_is_named_and_finished_parts_are_kept(tmp_path: Path) -> None:
    config = small(small_input(tmp_path / "in", FILES))
    bad = config.data.input / "a/validation/0.jsonl"
    bad.write_text('{"text": "fine"}\n{"txet": "bad"}\n')
    with pytest.raises(DataError, match=r"a/validation/0\.jsonl, line 2: bad record"):
        prepare_data(config, tmp_path / "out")
    bad.write_text('{"text": "' + "fine " * 300 + '"}\n')
    prepare_data(config, tmp_path / "out")
    assert not (tmp_path / "out" / ".parts").exists()


def test_too_many_epochs_keeps_the_parts(tmp_path: Path) -> None:
    config = small(small_input(tmp_path / "in", FILES), max_epochs=4)
    with pytest.raises(DataError, match="source 'a' would be repeated"):
        prepare_data(config, tmp_path / "out")
    assert len(list((tmp_path / "out" / ".parts").rglob("*.idx"))) == 5
    assert not (tmp_path / "out" / "a").exists()


def test_vocabulary_larger_than_the_models(tmp_path: Path) -> None:
    config = toy()
    config = config.model_copy(update={"model": config.model.model_copy(update={"vocab_size": 2000})})
    for call in (lambda: prepare_data(config, tmp_path), lambda: input_digests(config, DigestCache(tmp_path / "c"))):
        with pytest.raises(ConfigError, match=r"has 2048 pieces, more than model\.vocab_size 2000"):
            call()


def test_input_digests(tmp_path: Path) -> None:
    digests = input_digests(toy(), DigestCache(tmp_path / "cache.json"))
    assert len(digests) == 8
    assert digests["tokenizer.model"] == sha256_of(Path("data/tokenizers/demo-2048.model"))
    name = "open-web-math/validation/0.jsonl.zst"
    assert digests[name] == hashlib.sha256((INPUT / name).read_bytes()).hexdigest()
    # the same wherever it lies
    shutil.copytree(INPUT, tmp_path / "elsewhere")
    assert input_digests(toy(tmp_path / "elsewhere"), DigestCache(tmp_path / "other.json")) == digests


def test_missing_input_is_found_before_any_work(tmp_path: Path) -> None:
    folder = small_input(tmp_path / "in", FILES)
    shutil.rmtree(folder / "b")
    for call in (
        lambda: prepare_data(small(folder), tmp_path / "out"),
        lambda: input_digests(small(folder), DigestCache(tmp_path / "cache.json")),
    ):
        with pytest.raises(DataError, match="source 'b' has no folder"):
            call()
    assert not (tmp_path / "out").exists()
    with pytest.raises(DataError, match=r"data\.input .*nowhere is not a folder"):
        prepare_data(small(tmp_path / "nowhere"), tmp_path / "out")


PARENT = """
import multiprocessing, os, time
from concurrent.futures import ProcessPoolExecutor
from tasks.tokenize import _end_with_parent
if __name__ == "__main__":
    pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=_end_with_parent)
    print(pool.submit(os.getpid).result(), flush=True)
    pool.submit(time.sleep, 300).result()
"""


def test_workers_end_when_the_parent_is_killed(tmp_path: Path) -> None:
    """Otherwise it would wait for work for ever, and hold its memory."""
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    worker = int(parent.stdout.readline())
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    for _ in range(300):
        if not Path(f"/proc/{worker}").exists() or " Z " in Path(f"/proc/{worker}/stat").read_text():
            return
        time.sleep(0.1)
    os.kill(worker, signal.SIGKILL)
    pytest.fail("the worker outlived its parent by 30 s")
