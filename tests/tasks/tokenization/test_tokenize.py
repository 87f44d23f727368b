"""prepare-data on the demo's real text: ids are SentencePiece's, restartable, the same for any number of workers."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import sentencepiece
import zstandard

from neox_core.artifact import DigestCache
from neox_core.config import RunConfig, load_config
from neox_core.data.dataset import open_training_data
from neox_core.data.indexed import IndexedDataset
from neox_core.data.ledger import LEFT_OUT, run_ledger
from neox_core.data.tokenization.part import make_part
from neox_core.data.tokenization.part_files import PARTS, PartPaths
from neox_core.data.tokenization.part_settings import Done, PartSettings, TokenizerSettings
from neox_core.data.tokenization.readers import InputFile, register_source_format
from neox_core.errors import ConfigError, DataError
from neox_core.progress import silent
from neox_core.storage.digest import sha256_of
from tasks.prepare import prepare
from tasks.tokenization.pool import made_in_processes
from tasks.tokenization.tokenize import checked_inputs, input_digests, prepare_data
from tests.meanwhile import meanwhile
from tests.neox_core.data.tokenization.readers.stories import STORIES
from tests.processes import command_of
from tests.waiting import wait_for

INPUT = Path("data/tiny-proof-pile")
MODEL = Path("data/tokenizers/demo-2048.model").resolve()


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
    """Without the parts."""
    files = {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()}
    return {name.as_posix(): path.read_bytes() for name, path in files.items() if PARTS not in name.parts}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("prepared")
    return folder, prepare_data(toy(), folder, folder)


def test_every_id_is_sentencepieces(prepared: tuple[Path, dict[str, Any]]) -> None:
    folder, ledger = prepared
    reference = sentencepiece.SentencePieceProcessor(model_file="data/tokenizers/demo-2048.model")
    splits = [("arxiv", "train"), *(("open-web-math", split) for split in ("train", "validation"))]
    assert sorted(contents(folder)) == sorted(f"{s}/{split}{end}" for s, split in splits for end in (".bin", ".idx"))
    for source, split in splits:
        texts = texts_of(INPUT / source / split)
        expected = [[*reference.encode(text), reference.eos_id()] for text in texts]
        assert len(texts) > 0
        assert documents_of(folder / source / split) == expected
        assert ledger["sources"][source][split] == {
            "documents_in": len(texts),
            "documents": len(texts),
            "bytes": sum(len(text.encode()) for text in texts),
            "tokens": sum(map(len, expected)),
            **dict.fromkeys(LEFT_OUT, 0),
        }
    assert ledger["encoder"]["documents_verified"] >= 6  # the first of each file
    assert "gigatoken" in ledger["encoder"]["engine"]


def test_a_registered_format_is_read_in_worker_processes(tmp_path: Path) -> None:
    """They are started anew, and know of it by the settings that they are sent."""
    register_source_format(STORIES)
    folder = tmp_path / "text" / "tales" / "train"
    folder.mkdir(parents=True)
    (folder / "1.story").write_text("Once upon a time.")
    (folder / "2.jsonl").write_text(json.dumps({"text": "The end."}))
    config = toy(tmp_path / "text", sources={"tales": {"weight": 1}}, eval_sources=["tales"])
    for split in ("validation", "test"):
        shutil.copytree(folder, folder.with_name(split))
    ledger = prepare_data(config, tmp_path / "out", tmp_path / "out")
    assert ledger["sources"]["tales"]["train"]["documents"] == 2
    reference = sentencepiece.SentencePieceProcessor(model_file=str(MODEL))
    texts = ["text: Once upon a time.", "The end."]
    assert documents_of(tmp_path / "out" / "tales" / "train") == [
        [*reference.encode(x), reference.eos_id()] for x in texts
    ]


def test_ledger_of_the_run(prepared: tuple[Path, dict[str, Any]]) -> None:
    counts = prepared[1]
    assert set(counts["sources"]["arxiv"]) == {"train"}
    run = run_ledger(counts["sources"], toy())["run"]
    assert run["arxiv"]["sequences"] + run["open-web-math"]["sequences"] == 1600
    assert run["arxiv"]["share"] == run["arxiv"]["sequences"] / 1600 == pytest.approx(1 / 3, abs=1 / 1600)
    json.dumps(counts, allow_nan=False)


def test_two_workers_give_the_same_bits_and_progress(prepared: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    seen: list[tuple[float, str]] = []
    ledger = prepare_data(toy(workers=2), tmp_path, tmp_path, lambda share, text: seen.append((share, text)))
    assert ledger == prepared[1]
    assert contents(tmp_path) == contents(prepared[0])
    assert seen[0] == (0.0, "0 of 6 files")
    assert seen[-1] == (1.0, "6 files done")
    assert re.fullmatch(r"6 of 6 files, [\d.]+ MB/s, [\d.]+M tokens/s, 0:00 left", seen[-5][1])
    assert [share for share, _ in seen] == sorted(share for share, _ in seen)


def part_of(config: RunConfig, number: int, folder: Path) -> tuple[InputFile, PartPaths]:
    file = checked_inputs(config)[number]
    make_part(file, PartSettings.of(config), folder)
    return file, PartPaths.of(file, folder)


def test_seed_option_ends_documents_in_unk(tmp_path: Path) -> None:
    config = toy()
    config = config.model_copy(update={"tokenizer": config.tokenizer.model_copy(update={"end_of_document": "unk"})})
    _, paths = part_of(config, 0, tmp_path)
    ends = [document[-1] for document in documents_of(paths.prefix.with_name(paths.prefix.name + ".x"))]
    assert len(ends) > 0
    assert set(ends) == {0}


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
    prepare_data(config, tmp_path / "whole", tmp_path / "whole")
    # As a kill leaves it: one part whole, one without its record, a temporary file.
    _, done = part_of(config, 0, tmp_path / "out")
    _, half = part_of(config, 1, tmp_path / "out")
    half.record.unlink()
    half.prefix.with_name(half.prefix.name + ".bin").write_bytes(b"half")
    (tmp_path / "out" / "a").mkdir()
    (tmp_path / "out" / "a" / ".train.bin.0123.tmp").write_bytes(b"half")
    kept = done.documents.stat().st_ino
    part_of(config, 0, tmp_path / "out")
    assert done.documents.stat().st_ino == kept
    prepare_data(config, tmp_path / "out", tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    "change",
    ["text", "end of document", "text key", "truncated", "flipped bit", "lost index", "lost table", "missing list"],
)
def test_part_of_other_input_is_not_reused(tmp_path: Path, change: str) -> None:
    config = small(small_input(tmp_path / "in", FILES))
    file, paths = part_of(config, 0, tmp_path)
    part_bin = paths.prefix.with_name(paths.prefix.name + ".bin")
    before, kept = part_bin.read_bytes(), paths.documents.stat().st_ino
    if change == "text":
        Path(file.location).write_text(json.dumps({"text": "other"}) + "\n")
    elif change == "end of document":
        tokenizer = config.tokenizer.model_copy(update={"end_of_document": "unk"})
        config = config.model_copy(update={"tokenizer": tokenizer})
    elif change == "text key":
        Path(file.location).write_text(json.dumps({"body": "other"}) + "\n")
        config = small(tmp_path / "in", text_key="body")
    elif change == "truncated":
        part_bin.write_bytes(before[:-2])
    elif change == "flipped bit":
        part_bin.write_bytes(before[:-2] + b"zz")
    elif change in ("lost index", "lost table"):  # as a power cut may leave a file: its size, but zeros
        index = paths.prefix.with_name(paths.prefix.name + ".idx")
        lost = index if change == "lost index" else paths.documents
        lost.write_bytes(lost.read_bytes()[:-16] + bytes(16))
    else:
        paths.rejected.unlink()
    part_of(config, 0, tmp_path)
    assert paths.documents.stat().st_ino != kept
    assert paths.rejected.exists()
    made_anew = change not in ("text", "end of document", "text key")
    assert (part_bin.read_bytes() == before) == made_anew


def test_too_many_bad_records_are_named_and_finished_parts_are_kept(tmp_path: Path) -> None:
    config = small(small_input(tmp_path / "in", FILES))
    bad = Path(config.data.input) / "a/validation/0.jsonl"
    bad.write_text('{"text": "fine"}\n{"txet": "bad"}\n')
    with pytest.raises(
        DataError, match=r"'a': 1 of 5 records are bad.*a/validation/0\.jsonl, line 2: it has no \"text\""
    ):
        prepare_data(config, tmp_path / "out", tmp_path / "out")
    listed = json.loads((tmp_path / "out" / "rejected.jsonl").read_text())
    assert (listed["file"], listed["line"]) == ("a/validation/0.jsonl", 2)
    bad.write_text('{"text": "' + "fine " * 300 + '"}\n')
    prepare_data(config, tmp_path / "out", tmp_path / "out")
    assert not (tmp_path / "out" / "rejected.jsonl").exists()


def test_too_many_epochs_fail_when_the_artifact_is_there(tmp_path: Path) -> None:
    """So that `llemma data plan` can show the table, and another mixture needs no new tokenization."""
    base = small(small_input(tmp_path / "in", FILES), max_epochs=4).model_copy(update={"workdir": tmp_path / "run"})
    with pytest.raises(DataError, match="source 'a' would be repeated"):
        prepare(base, silent)
    enough = base.model_copy(update={"data": base.data.model_copy(update={"max_epochs": 1e6})})
    assert prepare(enough, silent).skipped


def test_vocabulary_larger_than_the_models(tmp_path: Path) -> None:
    config = toy()
    config = config.model_copy(update={"model": config.model.model_copy(update={"vocab_size": 2000})})
    for call in (
        lambda: prepare_data(config, tmp_path, tmp_path),
        lambda: input_digests(config, DigestCache(tmp_path / "c")),
    ):
        with pytest.raises(ConfigError, match=r"has 2048 pieces, more than model\.vocab_size 2000"):
            call()


def test_input_digests(tmp_path: Path) -> None:
    digests = input_digests(toy(), DigestCache(tmp_path / "cache.json"))
    assert len(digests) == 7
    assert digests["tokenizer.model"] == sha256_of(Path("data/tokenizers/demo-2048.model"))
    name = "open-web-math/validation/0.jsonl.zst"
    assert digests[name] == hashlib.sha256((INPUT / name).read_bytes()).hexdigest()
    # the same wherever it lies
    shutil.copytree(INPUT, tmp_path / "elsewhere")
    assert input_digests(toy(tmp_path / "elsewhere"), DigestCache(tmp_path / "other.json")) == digests


def test_missing_input_is_found_before_any_work(tmp_path: Path) -> None:
    folder = small_input(tmp_path / "in", FILES)
    shutil.rmtree(folder / "b")
    sources = {"a": {"weight": 1}, "b": {"weight": 1}}
    for call in (
        lambda: prepare_data(small(folder, sources=sources), tmp_path / "out", tmp_path / "out"),
        lambda: input_digests(small(folder, sources=sources), DigestCache(tmp_path / "cache.json")),
    ):
        with pytest.raises(DataError, match="source 'b' has no train text"):
            call()
    assert not (tmp_path / "out").exists()
    with pytest.raises(DataError, match=r"data\.input .*nowhere is not a folder"):
        prepare_data(small(tmp_path / "nowhere"), tmp_path / "out", tmp_path / "out")


def test_a_source_that_is_left_out_needs_no_text(tmp_path: Path) -> None:
    """Sections are merged, so that weight 0 is the way to leave out one of an included mixture."""
    folder = small_input(tmp_path / "in", FILES)
    shutil.rmtree(folder / "b")
    config = small(folder)
    summary = prepare_data(config, tmp_path / "out", tmp_path / "out")
    assert set(summary["sources"]["b"]["train"].values()) == {0}
    assert run_ledger(summary["sources"], config)["run"]["b"]["sequences"] == 0
    assert len(IndexedDataset(tmp_path / "out/b/train")) == 0
    assert len(open_training_data(tmp_path / "out", config).sequences(np.arange(3))) == 3
    later = [{"from_step": 2, "sources": {"a": {"weight": 1}, "b": {"weight": 1}}}]
    with pytest.raises(DataError, match=r"source 'b' has no train text: .*\(weight: 0 leaves a source out\)"):
        prepare_data(small(folder, weight_changes=later), tmp_path / "out", tmp_path / "out")
    named = {"a": {"weight": 1}, "b": {"weight": 0, "files": {"train": str(tmp_path / "nowhere/*.jsonl")}}}
    with pytest.raises(DataError, match=r"'b' has no train text: .*; correct data\.input or data\.sources$"):
        prepare_data(small(folder, sources=named), tmp_path / "out", tmp_path / "out")


PARENT = """
import sys, time
from pathlib import Path
from tasks.tokenization.tokenize import made_in_processes
from neox_core.data.tokenization.part_settings import PartSettings, TokenizerSettings
from neox_core.data.tokenization.readers import InputFile, register_source_format
settings = PartSettings(TokenizerSettings(Path("data/tokenizers/demo-2048.model").resolve()), None)
files = [InputFile("a", "train", f"{n}", path, n) for n, path in enumerate(sys.argv[2:])]
for file, record in made_in_processes(files, settings, Path(sys.argv[1]), 2):
    print(file.name, flush=True)
"""


def test_workers_end_when_the_parent_is_killed(tmp_path: Path) -> None:
    """Otherwise they would work on, or wait for work, for ever, and hold their memory."""
    endless = tmp_path / "endless.jsonl"
    os.mkfifo(endless)
    (tmp_path / "good.jsonl").write_text(json.dumps({"text": "good"}) + "\n")
    command = [sys.executable, "-c", PARENT, str(tmp_path / "out"), str(endless), str(tmp_path / "good.jsonl")]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    assert parent.stdout.readline() == "1\n"
    family = psutil.Process(parent.pid).children(recursive=True)
    assert len(family) == 3  # the fork server and two workers
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    _, alive = psutil.wait_procs(family, timeout=300)
    for process in alive:
        process.kill()
    assert not alive


@pytest.mark.parametrize("workers", [1, 2])
def test_a_failure_ends_the_stage_though_many_files_wait(tmp_path: Path, workers: int) -> None:
    folder = small_input(tmp_path / "in", FILES | {f"a/train/{n:03d}.jsonl": ["some words " * 50] for n in range(40)})
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    body = pyarrow.table({"body": [f"word{n}" for n in range(9000)]})  # the largest file, so the first
    parquet.write_table(body, folder / "a/train/005.parquet")
    with pytest.raises(DataError, match=r"005\.parquet has no column 'text'"):
        prepare_data(small(folder, workers=workers), tmp_path / "out", tmp_path / "out")


def test_a_fork_server_that_cannot_start_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = small_input(tmp_path / "in", {"a.jsonl": ["text"]})
    file = InputFile("a", "train", "a.jsonl", str(folder / "a.jsonl"), 9)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(DataError, match=r"a tokenizer process was killed.*lower data.workers \(1\)"):
        list(made_in_processes([file] * 5000, PartSettings(TokenizerSettings(MODEL), None), tmp_path / "out", 1))


def test_killed_workers_are_reported(tmp_path: Path) -> None:
    endless = tmp_path / "endless.jsonl"
    os.mkfifo(endless)
    files = [InputFile("a", "train", "0.jsonl", str(endless), 1)]
    for whose in ("worker", "fork server"):
        made = made_in_processes(files, PartSettings(TokenizerSettings(MODEL), None), tmp_path / "out", 1)

        def kill() -> None:
            def workers() -> list[psutil.Process]:
                return [worker for server in fork_servers() for worker in server.children()]

            worker, *_ = wait_for(workers, seconds=300.0)
            (worker if whose == "worker" else worker.parent()).kill()  # noqa: B023

        with (
            meanwhile(kill),
            pytest.raises(DataError, match=r"was killed, perhaps .* lower data\.workers \(1\) and run again"),
        ):
            next(made)


def test_progress_within_a_file_and_all_ends_if_the_callback_fails(tmp_path: Path) -> None:
    """As an interrupt makes it fail."""
    small_input(tmp_path, {"x.jsonl": ["some words and more of them " * 40_000] * 9})
    file = InputFile("a", "train", "x", str(tmp_path / "x.jsonl"), (tmp_path / "x.jsonl").stat().st_size)
    slowly = PartSettings(TokenizerSettings(MODEL, engine="sentencepiece"), None)
    reported: list[Done] = []

    def on_progress(done: Done) -> None:
        reported.append(done)
        if done.stored:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        next(made_in_processes([file], slowly, tmp_path / "out", 1, on_progress))
    assert 0 < reported[-1].stored < file.size
    assert fork_servers() == []
    assert list((tmp_path / "out").rglob("*.json")) == []


def fork_servers() -> list[psutil.Process]:
    """Of this process, which has servers among its children too, and children that have ended."""
    children = psutil.Process().children()
    return [child for child in children if "tasks.tokenization.fork_server" in " ".join(command_of(child))]


MEMORY = """
import resource, sys
from pathlib import Path
from tasks.tokenization.pool import made_in_processes
from neox_core.data.tokenization.part_settings import PartSettings, TokenizerSettings
from neox_core.data.tokenization.readers import InputFile, register_source_format
settings = PartSettings(TokenizerSettings(Path("data/tokenizers/demo-2048.model").resolve()), None)
(_, made), = made_in_processes([InputFile("a", "train", "x", sys.argv[2], 1)], settings, Path(sys.argv[1]), 1)
print(made.documents, made.rejected, made.verified, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024)
"""


def test_memory_of_a_worker_on_huge_documents(tmp_path: Path) -> None:
    """Without a blank, and of such letters that it cannot be cut; then digits, which give the most ids; then words."""
    million = 1_000_000
    texts = ["e" * 5 * million, "0123456789" * (million // 2), "some words " * (million // 2), "x" * 200_000]
    small_input(tmp_path, {"x.jsonl": texts})
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "out"), str(tmp_path / "x.jsonl")]
    answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=500).stdout.split()
    documents, rejected, verified, mebibytes = map(int, answer)
    assert (documents, rejected, verified) == (4, 0, 1)
    assert mebibytes < 476  # 500 MB
    reference = sentencepiece.SentencePieceProcessor(model_file=str(MODEL))
    made = IndexedDataset(tmp_path / "out" / ".parts" / "a" / "train" / "x")
    for document, text in zip(made, texts, strict=True):
        assert np.array_equal(document[:-1], reference.encode(text))


@pytest.mark.parametrize("workers", [1, 2])
def test_every_document_is_accounted_for(tmp_path: Path, workers: int) -> None:
    """Rejected, duplicate and contaminated documents in one run, with a damaged file left out."""
    question = "how many eggs does she sell at the market each day"
    (tmp_path / "eval.jsonl").write_text(json.dumps({"id": "q1", "question": question}) + "\n")
    files = {f"a/{split}/0.jsonl": [*WORDS, *WORDS] for split in ("train", "validation", "test")}
    files |= {"a/train/1.jsonl": ["page: How MANY eggs does she sell!", WORDS[1]], "b/train/0.jsonl": ["x", "x", "y"]}
    folder = small_input(tmp_path / "in", files)
    with (folder / "a/train/1.jsonl").open("a") as file:
        file.write('{"no": 1}\n' + json.dumps({"text": "page: How MANY eggs does she sell!"}) + "\n")
    (folder / "a/train/2.jsonl.zst").write_text("not zstd")
    (tmp_path / "out").mkdir()
    result = prepare_data(
        small(
            folder,
            workers=workers,
            deduplicate=True,
            decontaminate=True,
            evaluation_sets=[tmp_path / "eval.jsonl"],
            overlap_words=5,
            max_rejected=0.1,
            skip_damaged_files=True,
        ),
        tmp_path / "out",
        tmp_path / "parts",
    )
    reference = sentencepiece.SentencePieceProcessor(model_file="data/tokenizers/demo-2048.model")
    kept = {("a", "train"): WORDS, ("b", "train"): ["x", "y"], ("a", "validation"): WORDS}
    for (source, split), texts in kept.items():
        expected = [[*reference.encode(text), reference.eos_id()] for text in texts]
        assert documents_of(tmp_path / "out" / source / split) == expected
        counts = result["sources"][source][split]
        assert (counts["documents"], counts["tokens"]) == (len(texts), sum(map(len, expected)))
        assert counts["bytes"] == sum(map(len, texts))
    train = result["sources"]["a"]["train"]
    left_out = {unit: train[unit] for unit in ("documents_in", "rejected", "duplicates", "decontaminated")}
    assert left_out == {"documents_in": 8, "rejected": 1, "duplicates": 4, "decontaminated": 1}
    total = result["accounting"]
    assert total["documents_in"] == sum(total[unit] for unit in ("documents", *LEFT_OUT))
    assert total["damaged_bytes"] == len("not zstd") < total["stored_bytes"]
    assert result["damaged_files"] == ["a/train/2.jsonl.zst"]
    assert result["overlap"]["sources"]["a"] == {"items": 1, "documents": 2}
    sets = {"items": 1, "by_runs": 1, "as_a_whole": 0, "not_checked": 0, "items_found": 1}
    assert result["overlap"]["sets"] == {"eval.jsonl": sets}
    listed = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert [(line["file"], line["line"]) for line in listed] == [("a/train/1.jsonl", 3), ("a/train/2.jsonl.zst", None)]
    overlap = json.loads((tmp_path / "out" / "overlap.json").read_text())
    assert [hit["line"] for hit in overlap["sources"]["a"]["hits"]] == [1, 4]


def test_training_texts_in_validation_are_reported_and_dropped_on_request(tmp_path: Path) -> None:
    """Of whatever source; nearly equal ones if near-duplicates are looked for."""
    known = " ".join(f"word{number}" for number in range(300))
    files = {
        "a/train/0.jsonl": ["fine", "known short text"],
        "a/validation/0.jsonl": ["known short text", "other"],
        "b/train/0.jsonl": [known + " and an end", "b", "known short text"],
        "b/validation/0.jsonl": [known],
    }
    folder = small_input(tmp_path / "in", files)
    found = {}
    for number, data in enumerate(
        ({}, {"near_duplicates": 0.8}, {"drop_validation_duplicates": True, "near_duplicates": 0.8})
    ):
        out = tmp_path / f"out{number}"
        result = prepare_data(small(folder, eval_sources=["a", "b"], **data), out, out)
        lines = [json.loads(line) for line in (out / "in_validation.jsonl").read_text().splitlines()]
        counts = [result["sources"][source]["train"]["documents"] for source in "ab"]
        found[number] = (
            result["in_validation"],
            [(line["file"], line["line"], line["likeness"]) for line in lines],
            counts,
        )
    equal = [("a/train/0.jsonl", 2, "equal"), ("b/train/0.jsonl", 3, "equal")]
    both = [*equal, ("b/train/0.jsonl", 1, "near")]
    assert found[0] == ({"a": {"equal": 1}, "b": {"equal": 1}}, equal, [2, 3])
    assert found[1] == ({"a": {"equal": 1, "near": 0}, "b": {"equal": 1, "near": 1}}, both, [2, 3])
    assert found[2] == (found[1][0], both, [1, 1])


def test_duplicates_across_sources(tmp_path: Path) -> None:
    """And near-duplicates; each source by itself keeps its own."""
    long = " ".join(f"word{number}" for number in range(300))
    files = {
        "a/train/0.jsonl": ["same", long],
        "a/validation/0.jsonl": ["of its own"],
        "b/train/0.jsonl": ["same", long + " end", "b", "b"],
    }
    folder = small_input(tmp_path / "in", files)
    kept = {}
    for across in (False, True):
        out = tmp_path / f"out{across}"
        config = small(folder, deduplicate=True, near_duplicates=0.8, deduplicate_across=across)
        train = prepare_data(config, out, out)["sources"]["b"]["train"]
        kept[across] = [train[unit] for unit in ("documents", "duplicates", "near_duplicates")]
    assert kept == {False: [3, 1, 0], True: [1, 2, 1]}


def test_all_damaged_files_are_named_and_what_may_be_skipped_is_bounded(tmp_path: Path) -> None:
    folder = small_input(tmp_path / "in", FILES)
    for name in ("a/train/8.jsonl.zst", "b/train/9.jsonl.gz"):
        (folder / name).write_bytes(b"\1either of the two")
    (folder / "b/train/7.jsonl").write_bytes(b"")  # whole
    with pytest.raises(
        DataError, match=r"2 of \d+ files are damaged: .*8\.jsonl\.zst \(Unable to.*; .*9\.jsonl\.gz \(Not a gz"
    ):
        prepare_data(small(folder), tmp_path / "out", tmp_path / "out")
    with pytest.raises(
        DataError, match=r"source 'a': damaged files hold 18 of its .* more than data\.max_damaged 0\.0001: .*8\.j"
    ):
        prepare_data(small(folder, skip_damaged_files=True, max_damaged=0.0001), tmp_path / "out", tmp_path / "out")
    result = prepare_data(small(folder, skip_damaged_files=True, max_damaged=0.9), tmp_path / "out", tmp_path / "out")
    assert result["damaged_files"] == ["a/train/8.jsonl.zst", "b/train/9.jsonl.gz"]
    assert result["empty_files"] == ["b/train/7.jsonl"]
    assert result["accounting"]["damaged_bytes"] == 36


def test_a_source_without_other_splits_and_test_splits_only_on_request(tmp_path: Path) -> None:
    files = {
        "a/train/0.jsonl": WORDS,
        "a/validation/0.jsonl": WORDS[:1],
        "a/test/0.jsonl": WORDS,
        "b/train/0.jsonl": ["b"],
    }
    folder = small_input(tmp_path / "in", files)
    for test in (False, True):
        result = prepare_data(small(folder, test=test), tmp_path / str(test), tmp_path / str(test))
        assert set(result["sources"]["b"]) == {"train"}
        assert set(result["sources"]["a"]) == {"train", "validation", *(["test"] if test else [])}
        assert (tmp_path / str(test) / "a" / "test.bin").exists() == test
    shutil.rmtree(folder / "a" / "test")
    prepare_data(small(folder, test=True), tmp_path / "none", tmp_path / "none")  # there need not be any


def test_evaluation_sets_of_one_file_name_are_two(tmp_path: Path) -> None:
    """Whose items have no ids."""
    texts = ["how many eggs does she sell", "which of these is a prime number"]
    sets = [tmp_path / name / "test.jsonl" for name in ("gsm8k", "mmlu")]
    for path, text in zip(sets, texts, strict=True):
        path.parent.mkdir()
        path.write_text(json.dumps({"question": text}) + "\n")
    config = small(
        small_input(tmp_path / "in", FILES | {"a/train/2.jsonl": texts}), evaluation_sets=sets, overlap_words=5
    )
    assert prepare_data(config, tmp_path / "out", tmp_path / "out")["overlap"]["sources"]["a"] == {
        "items": 2,
        "documents": 2,
    }
    overlap = json.loads((tmp_path / "out" / "overlap.json").read_text())
    assert {name: found["items_found"] for name, found in overlap["sets"].items()} == {
        "gsm8k/test.jsonl": 1,
        "mmlu/test.jsonl": 1,
    }
    assert [hit["set"] for hit in overlap["sources"]["a"]["hits"]] == ["gsm8k/test.jsonl", "mmlu/test.jsonl"]


def test_begin_of_document(tmp_path: Path) -> None:
    """SentencePiece's own <s> and </s> around every document of every split."""
    config = toy()
    tokenizer = config.tokenizer.model_copy(update={"begin_of_document": True})
    prepare_data(config.model_copy(update={"tokenizer": tokenizer}), tmp_path, tmp_path)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(MODEL), add_bos=True, add_eos=True)
    for source, split in (("arxiv", "train"), ("open-web-math", "train"), ("open-web-math", "validation")):
        made, texts = documents_of(tmp_path / source / split), texts_of(INPUT / source / split)
        assert made == reference.encode(texts)
        assert {document[0] for document in made} == {1}
