"""The job array's logic with a scheduler that does as it is told, and on a real SLURM."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from neox_core.config import TokenizeJobConfig
from neox_core.data.tokenization.part_files import PartPaths
from neox_core.data.tokenization.part_settings import PartSettings, TokenizerSettings
from neox_core.data.tokenization.readers import InputFile
from neox_core.errors import DataError, LaunchError
from neox_core.storage.digest import sha256_of
from tasks.jobs import job, retry
from tasks.jobs.registry import register_executor
from tasks.jobs.retry import NoAnswer
from tasks.tokenization import array as tokenize_array
from tasks.tokenization.array import jobs_folder, made_in_jobs
from tasks.tokenization.tokenize import prepare_data
from tests.tasks.jobs.scripted_executor import ScriptedExecutor
from tests.tasks.tokenization.test_tokenize import MODEL, contents, small, small_input

SETTINGS = PartSettings(TokenizerSettings(MODEL), None)
JOBS = TokenizeJobConfig(executor="scripted")


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> ScriptedExecutor:
    """A scheduler that configurations know as 'scripted'."""
    made = ScriptedExecutor()
    register_executor("scripted", lambda: made)
    monkeypatch.setattr(tokenize_array, "_POLL_SECONDS", 0.0)
    for name in ("_POLL_SECONDS", "_SHARED_DISK_SECONDS"):
        monkeypatch.setattr(job, name, 0.0)
    for name in ("_SILENCE_SECONDS", "_MEANWHILE_SECONDS"):
        monkeypatch.setattr(retry, name, 0.0)
    monkeypatch.setattr(retry, "_UNANSWERED", 10)
    return made


def files(folder: Path, count: int = 3) -> list[InputFile]:
    for number in range(count):
        (folder / f"{number}.jsonl").write_text((json.dumps({"text": f"text {number}"}) + "\n") * (number + 1))
    paths = [folder / f"{number}.jsonl" for number in range(count)]
    return [InputFile("a", "train", path.name, str(path), path.stat().st_size) for path in paths]


def make(inputs: list[InputFile], folder: Path) -> Any:
    return made_in_jobs(inputs, SETTINGS, folder / "out", JOBS)


def interrupted(cluster: ScriptedExecutor, inputs: list[InputFile], folder: Path) -> Any:
    """A call that is killed after sbatch and before the array was noted down."""

    def kill(ids: list[str]) -> None:
        raise KeyboardInterrupt

    cluster.on_submit = kill
    return make(inputs, folder)


def test_a_later_call_submits_only_what_is_missing(cluster: ScriptedExecutor, tmp_path: Path) -> None:
    """Killed with one part made (the largest file's, which is task 0), one task failed and one pending."""
    inputs = files(tmp_path)
    cluster.on_submit = lambda ids: cluster.run(ids[0])
    calls = make(inputs, tmp_path)
    first, record = next(calls)
    assert (first.name, record.documents) == ("2.jsonl", 3)
    calls.close()
    cluster.end("failed", "1_1")
    cluster.on_submit = lambda ids: cluster.run(*ids, "1_2")
    made = {file.name: record.documents for file, record in make(inputs, tmp_path)}
    assert made == {"0.jsonl": 1, "1.jsonl": 2, "2.jsonl": 3}
    assert list(cluster.tasks) == ["1_0", "1_1", "1_2", "2"]
    assert cluster.cancelled == []


def test_a_part_that_is_gone_is_made_again(cluster: ScriptedExecutor, tmp_path: Path) -> None:
    inputs = files(tmp_path)
    cluster.on_submit = lambda ids: cluster.run(*ids)
    assert len(list(make(inputs, tmp_path))) == 3
    PartPaths.of(inputs[1], tmp_path / "out").record.unlink()
    assert len(list(make(inputs, tmp_path))) == 3
    assert list(cluster.tasks) == ["1_0", "1_1", "1_2", "2"]


@pytest.mark.parametrize("suffix", [".bin", ".idx", ".documents.npy", ".rejected.jsonl"])
def test_a_part_that_was_damaged_since_is_made_again(cluster: ScriptedExecutor, tmp_path: Path, suffix: str) -> None:
    inputs = files(tmp_path)
    cluster.on_submit = lambda ids: cluster.run(*ids)
    assert len(list(make(inputs, tmp_path))) == 3
    prefix = PartPaths.of(inputs[1], tmp_path / "out").prefix
    damaged = prefix.with_name(prefix.name + suffix)
    whole = damaged.read_bytes()
    damaged.write_bytes(bytes([whole[0] ^ 1]) + whole[1:] if whole else b"x")
    assert len(list(make(inputs, tmp_path))) == 3
    assert damaged.read_bytes() == whole
    assert list(cluster.tasks) == ["1_0", "1_1", "1_2", "2"]


def test_parts_that_were_just_made_are_not_read_again(
    cluster: ScriptedExecutor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[object] = []
    monkeypatch.setattr(tokenize_array, "find_part", lambda *arguments: looked.append(arguments))
    cluster.on_submit = lambda ids: cluster.run(*ids)
    assert len(list(make(files(tmp_path), tmp_path))) == 3
    assert looked == []


def test_tasks_for_other_files_are_cancelled(cluster: ScriptedExecutor, tmp_path: Path) -> None:
    (tmp_path / "others").mkdir()
    with pytest.raises(KeyboardInterrupt):
        list(interrupted(cluster, files(tmp_path / "others", 2), tmp_path))

    def run(ids: list[str]) -> None:
        ended = [cluster.states_by_id[task].state for task in ("1_0", "1_1")]
        assert ended == ["cancelled", "cancelled"], "they have ended before"
        cluster.run(*ids)

    cluster.on_submit = run
    assert len(list(make(files(tmp_path), tmp_path))) == 3
    assert cluster.cancelled == ["1_0", "1_1"]


@pytest.mark.parametrize("change", ["text of the same size", "skip_damaged_files", "end_of_document"])
def test_tasks_of_before_a_correction_are_not_taken(cluster: ScriptedExecutor, tmp_path: Path, change: str) -> None:
    inputs, settings = files(tmp_path, 1), SETTINGS
    cluster.on_submit = lambda ids: cluster.run(*ids)
    list(make(inputs, tmp_path))
    if change == "text of the same size":
        Path(inputs[0].location).write_text(json.dumps({"text": "text x"}) + "\n")
        os.utime(inputs[0].location, (1, 1))
    elif change == "skip_damaged_files":
        settings = replace(settings, skip_damaged_files=True)
    else:
        settings = replace(settings, tokenizer=replace(settings.tokenizer, end_of_document="unk"))
    ((_, made),) = made_in_jobs(inputs, settings, tmp_path / "out", JOBS)
    assert len(cluster.by_name) == 2
    assert made.made_from == {"text": sha256_of(Path(inputs[0].location)), **settings.logical()}


def test_failures_arrive_as_errors(cluster: ScriptedExecutor, tmp_path: Path) -> None:
    inputs = files(tmp_path, 1)
    cluster.on_submit = lambda ids: cluster.end("timeout", *ids)
    with pytest.raises(
        LaunchError, match=r"job 1 \(llemma-tokenize-\w+-\w+\) failed: its time limit is over: run again"
    ):
        next(make(inputs, tmp_path))
    Path(inputs[0].location).write_bytes(b"\xff\xfe")
    cluster.on_submit = lambda ids: cluster.run(*ids)
    for _ in range(2):  # the second call finds the file damaged by the first, and tries again
        _, made = next(make(inputs, tmp_path))
        assert made.damaged.startswith("its text is UTF-16 or UTF-32")
    assert len(cluster.by_name) == 3
    Path(inputs[0].location).unlink()
    Path(inputs[0].location).mkdir()
    with pytest.raises(DataError, match=r"0\.jsonl cannot be made a part of"):
        next(make(inputs, tmp_path))


def test_one_question_per_poll_and_silence_is_borne_for_a_while(
    cluster: ScriptedExecutor, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    inputs = files(tmp_path)
    calls = make(inputs, tmp_path)
    cluster.on_submit = lambda ids: cluster.run(ids[0])
    next(calls)
    cluster.questions.clear()
    cluster.silent = 10
    with pytest.raises(LaunchError, match=r"Socket timed out \(asked 10 times; what runs in SLURM goes on"):
        next(calls)
    assert cluster.questions == [["1_1", "1_2"]] * 10
    assert caplog.text.count("Socket timed out") == 9
    cluster.silent = 9  # the next call attaches to the two that go on, and fares better
    calls = make(inputs, tmp_path)
    next(calls)
    assert len(cluster.by_name) == 1
    cluster.silent = 9
    cluster.end("failed", "1_1")
    with pytest.raises(LaunchError, match=r"task 1_1 of job array 1 \(llemma-tokenize-\w+-\w+\) failed"):
        next(calls)


@pytest.mark.parametrize("count", [1, 3])
def test_an_array_whose_submitter_was_killed_is_found(cluster: ScriptedExecutor, tmp_path: Path, count: int) -> None:
    inputs = files(tmp_path, count)
    with pytest.raises(KeyboardInterrupt):
        next(interrupted(cluster, inputs, tmp_path))
    (ids,) = cluster.by_name.values()
    if count == 3:
        ids[2] = None  # type: ignore[call-overload]  # it never got its work
    cluster.run(*filter(None, ids))
    cluster.on_submit = lambda ids: cluster.run(*ids)
    assert len(list(make(inputs, tmp_path))) == count
    assert list(cluster.tasks) == (["1"] if count == 1 else ["1_0", "1_1", "1_2", "2"])


def test_an_array_that_got_no_answer_is_submitted_again(cluster: ScriptedExecutor, tmp_path: Path) -> None:
    def be_silent_once(ids: list[str]) -> None:
        cluster.on_submit = lambda ids: cluster.run(*ids)
        ids[:] = []
        raise NoAnswer("sbatch: error: Batch job submission failed: Socket timed out on send/recv operation")

    cluster.on_submit = be_silent_once
    assert len(list(make(files(tmp_path), tmp_path))) == 3
    assert list(cluster.tasks) == ["1_0", "1_1", "1_2", "2_0", "2_1", "2_2"]
    assert len(cluster.by_name) == 2  # so that the second is found by its name, not the first
    (record,) = jobs_folder(tmp_path / "out").glob("*/job.json")
    assert [task["id"] for task in json.loads(record.read_text())["tasks"]] == ["2_0", "2_1", "2_2"]

    def refuse(ids: list[str]) -> None:
        raise LaunchError("invalid partition: big")

    cluster.on_submit = refuse
    (tmp_path / "others").mkdir()
    with pytest.raises(LaunchError, match="invalid partition"):
        list(make(files(tmp_path / "others"), tmp_path))


@pytest.mark.slurm
def test_slurm_gives_the_same_bits(tmp_path: Path, slurm: Path) -> None:
    folder = small_input(
        tmp_path / "in", {f"a/{s}/{n}.jsonl": ["text"] * 99 for s in ("train", "validation") for n in "01"}
    )
    config = small(small_input(folder, {"b/train/0.jsonl": ["x"], "a/test/0.jsonl": ["y"]}))
    jobs = TokenizeJobConfig(parallelism=2, memory_gb=1)
    in_jobs = config.model_copy(update={"data": config.data.model_copy(update={"slurm": jobs})})
    assert prepare_data(in_jobs, tmp_path / "jobs", tmp_path / "jobs") == prepare_data(
        config, tmp_path / "here", tmp_path / "here"
    )
    assert contents(tmp_path / "jobs") == contents(tmp_path / "here")
    (folder / "a/train/1.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"a/train/1\.jsonl \(its text is UTF-16"):
        prepare_data(in_jobs, tmp_path / "bad", tmp_path / "bad")
