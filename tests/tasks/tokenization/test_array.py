"""The job array's logic with a stand-in for SLURM; on a real SLURM where there is one."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from submitit.core.utils import cloudpickle_dump

from neox_core.config import TokenizeJobConfig
from neox_core.data.tokenization.part_files import PartPaths
from neox_core.data.tokenization.part_settings import PartSettings, TokenizerSettings
from neox_core.data.tokenization.readers import InputFile
from neox_core.errors import DataError, LaunchError
from neox_core.storage.digest import sha256_of
from tasks.jobs import slurm
from tasks.tokenization import array as tokenize_array
from tasks.tokenization import record as tokenize_record
from tasks.tokenization.array import made_in_jobs
from tasks.tokenization.tokenize import prepare_data
from tests.tasks.tokenization.test_tokenize import MODEL, contents, small, small_input

SETTINGS = PartSettings(TokenizerSettings(MODEL), None)


class Cluster:
    """Takes arrays, runs a task when it is told to, and answers about states."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.tasks: dict[str, Callable[[], Any]] = {}
        self.states: dict[str, str] = {}
        self.cancelled: list[str] = []
        self.ending: dict[str, int] = {}
        self.names: dict[str, str] = {}
        self.questions: list[list[str]] = []
        self.silent = 0
        """Questions that SLURM leaves unanswered."""
        self.arrays = 0
        self.on_submit: Callable[[list[str]], None] = lambda ids: None
        """What happens to an array's tasks at once."""

    def submit(self, calls: list[Callable[[], Any]], name: str = "") -> list[Any]:
        self.arrays += 1
        self.names[name] = str(self.arrays)
        several = len(calls) > 1  # submitit makes no array of one
        ids = [f"{self.arrays}_{number}" if several else str(self.arrays) for number in range(len(calls))]
        self.tasks |= dict(zip(ids, calls, strict=True))
        self.states |= dict.fromkeys(ids, "pending")
        for job_id in ids:
            self.job(self.home, job_id).paths.submitted_pickle.touch()
        self.on_submit(ids)
        return [self.job(self.home, job_id) for job_id in ids]

    def job(self, home: Path, job_id: str) -> Any:
        paths = SimpleNamespace(
            submitted_pickle=home / f"{job_id}_submitted.pkl",
            result_pickle=home / f"{job_id}_0_result.pkl",
            stdout=home / f"{job_id}_0_log.out",
        )
        return _Job(job_id, paths)

    def task_states(self, tasks: list[str]) -> dict[str, str]:
        self.questions.append(tasks)
        if self.silent:
            self.silent -= 1
            raise slurm.NoAnswer("squeue does not answer: Socket timed out")
        for task in [task for task in tasks if task in self.ending]:
            self.ending[task] -= 1
            self.states[task] = "running" if self.ending[task] else "cancelled"
        return {task: self.states[task] for task in tasks}

    def cancel(self, *jobs: str) -> None:
        """Tasks end a while after their cancelling."""
        self.cancelled.extend(jobs)
        ending = [task for task in self.states if task in jobs or task.partition("_")[0] in jobs]
        self.ending = dict.fromkeys(ending, 2)

    def run(self, *ids: str) -> None:
        for job_id in ids:
            cloudpickle_dump(("success", self.tasks[job_id]()), self.job(self.home, job_id).paths.result_pickle)
            self.states[job_id] = "completed"


class _Job:
    def __init__(self, job_id: str, paths: Any) -> None:
        self.job_id, self.paths = job_id, paths


class _Executor:
    """The part of submitit's executor that is used."""

    def __init__(self, cluster: Cluster, name: str) -> None:
        self.cluster, self.name = cluster, name

    def batch(self) -> _Executor:
        return self

    def __enter__(self) -> None:
        self.jobs: list[Any] = []
        self.calls: list[Callable[[], Any]] = []

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Any:
        self.calls.append(lambda: function(*arguments))
        self.jobs.append(_Job("", None))
        return self.jobs[-1]

    def __exit__(self, *_: object) -> None:
        for job, submitted in zip(self.jobs, self.cluster.submit(self.calls, self.name), strict=True):
            job.job_id, job.paths = submitted.job_id, submitted.paths


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    made = Cluster(tmp_path / "out" / ".parts" / "jobs")
    made.home.mkdir(parents=True)
    monkeypatch.setattr(tokenize_array, "_executor", lambda home, jobs, name: _Executor(made, name))
    monkeypatch.setattr(tokenize_record.submitit, "SlurmJob", made.job)
    monkeypatch.setattr(slurm, "task_states", made.task_states)
    monkeypatch.setattr(slurm, "find_by_name", made.names.get)
    monkeypatch.setattr(slurm, "cancel", made.cancel)
    monkeypatch.setattr(tokenize_record, "_POLL_SECONDS", 0.0)
    for name in ("_POLL_SECONDS", "_ASK_SECONDS", "_SHARED_DISK_SECONDS"):
        monkeypatch.setattr(tokenize_array, name, 0.0)
    for name in ("_SILENCE_SECONDS", "_MEANWHILE_SECONDS"):
        monkeypatch.setattr(slurm, name, 0.0)
    monkeypatch.setattr(slurm, "_UNANSWERED", 10)
    return made


def files(folder: Path, count: int = 3) -> list[InputFile]:
    for number in range(count):
        (folder / f"{number}.jsonl").write_text((json.dumps({"text": f"text {number}"}) + "\n") * (number + 1))
    paths = [folder / f"{number}.jsonl" for number in range(count)]
    return [InputFile("a", "train", path.name, str(path), path.stat().st_size) for path in paths]


def make(inputs: list[InputFile], folder: Path) -> Any:
    return made_in_jobs(inputs, SETTINGS, folder / "out", TokenizeJobConfig())


def test_a_later_call_submits_only_what_is_missing(cluster: Cluster, tmp_path: Path) -> None:
    """Killed with one part made (the largest file's, which is task 0), one task failed and one pending."""
    inputs = files(tmp_path)
    cluster.on_submit = lambda ids: cluster.run(ids[0])
    calls = make(inputs, tmp_path)
    first, record = next(calls)
    assert (first.name, record.documents) == ("2.jsonl", 3)
    calls.close()
    cluster.states["1_1"] = "failed"
    cluster.on_submit = lambda ids: cluster.run(*ids, "1_2")
    made = {file.name: record.documents for file, record in make(inputs, tmp_path)}
    assert made == {"0.jsonl": 1, "1.jsonl": 2, "2.jsonl": 3}
    assert list(cluster.tasks) == ["1_0", "1_1", "1_2", "2"]
    assert cluster.cancelled == []


def test_a_part_that_is_gone_is_made_again(cluster: Cluster, tmp_path: Path) -> None:
    inputs = files(tmp_path)
    cluster.on_submit = lambda ids: cluster.run(*ids)
    assert len(list(make(inputs, tmp_path))) == 3
    PartPaths.of(inputs[1], tmp_path / "out").record.unlink()
    assert len(list(make(inputs, tmp_path))) == 3
    assert list(cluster.tasks) == ["1_0", "1_1", "1_2", "2"]


@pytest.mark.parametrize("suffix", [".bin", ".idx", ".documents.npy", ".rejected.jsonl"])
def test_a_part_that_was_damaged_since_is_made_again(cluster: Cluster, tmp_path: Path, suffix: str) -> None:
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
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[object] = []
    monkeypatch.setattr(tokenize_record, "find_part", lambda *arguments: looked.append(arguments))
    cluster.on_submit = lambda ids: cluster.run(*ids)
    assert len(list(make(files(tmp_path), tmp_path))) == 3
    assert looked == []


def test_tasks_for_other_files_are_cancelled(cluster: Cluster, tmp_path: Path) -> None:
    cluster.submit([list, list])
    (cluster.home / "array.json").write_text(json.dumps({"groups": "other", "jobs": ["1_0", "1_1"]}))

    def run(ids: list[str]) -> None:
        assert (cluster.states["1_0"], cluster.states["1_1"]) == ("cancelled", "cancelled"), "they have ended before"
        cluster.run(*ids)

    cluster.on_submit = run
    assert len(list(make(files(tmp_path), tmp_path))) == 3
    assert cluster.cancelled == ["1"]


@pytest.mark.parametrize("change", ["text of the same size", "skip_damaged_files", "end_of_document"])
def test_tasks_of_before_a_correction_are_not_taken(cluster: Cluster, tmp_path: Path, change: str) -> None:
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
    ((_, made),) = made_in_jobs(inputs, settings, tmp_path / "out", TokenizeJobConfig())
    assert cluster.arrays == 2
    assert made.made_from == {"text": sha256_of(Path(inputs[0].location)), **settings.logical()}


def test_failures_arrive_as_errors(cluster: Cluster, tmp_path: Path) -> None:
    inputs = files(tmp_path, 1)
    cluster.on_submit = lambda ids: cluster.states.update(dict.fromkeys(ids, "failed"))
    with pytest.raises(LaunchError, match=r"tokenization task 1 ended \(failed\) without a result: see .*1_0_log"):
        next(make(inputs, tmp_path))
    Path(inputs[0].location).write_bytes(b"\xff\xfe")
    cluster.on_submit = lambda ids: cluster.run(*ids)
    for _ in range(2):  # the second call finds the failure of the first, and tries again
        with pytest.raises(DataError, match=r"0\.jsonl is damaged \(its text is UTF-16 or UTF-32, not UTF-8\)"):
            next(make(inputs, tmp_path))
    assert cluster.arrays == 3


def test_one_question_per_poll_and_silence_is_borne_for_a_while(
    cluster: Cluster, tmp_path: Path, caplog: pytest.LogCaptureFixture
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
    assert cluster.arrays == 1
    cluster.silent = 9
    cluster.states["1_1"] = "failed"
    with pytest.raises(LaunchError, match=r"task 1_1 ended \(failed\)"):
        next(calls)


@pytest.mark.parametrize("count", [1, 3])
def test_an_array_whose_submitter_was_killed_is_found(cluster: Cluster, tmp_path: Path, count: int) -> None:
    """Killed after sbatch and before the array was noted down."""
    inputs = files(tmp_path, count)

    def kill(ids: list[str]) -> None:
        raise KeyboardInterrupt

    cluster.on_submit = kill
    with pytest.raises(KeyboardInterrupt):
        next(make(inputs, tmp_path))
    if count == 3:
        cluster.job(cluster.home, "1_2").paths.submitted_pickle.unlink()  # not moved there before the kill
    cluster.on_submit = lambda ids: cluster.run(*[task for task in cluster.tasks if task != "1_2"])
    cluster.run(*[task for task in list(cluster.tasks) if task != "1_2"][:1])
    assert len(list(make(inputs, tmp_path))) == count
    assert list(cluster.tasks) == (["1"] if count == 1 else ["1_0", "1_1", "1_2", "2"])
    assert cluster.cancelled == ([] if count == 1 else ["1_2"])


def test_an_array_that_sbatch_gave_no_answer_about_is_submitted_again(cluster: Cluster, tmp_path: Path) -> None:
    """SLURM has taken the first all the same; its tasks have no pickles."""

    def be_silent_once(ids: list[str]) -> None:
        cluster.on_submit = lambda ids: cluster.run(*ids)
        for task in ids:
            cluster.job(cluster.home, task).paths.submitted_pickle.unlink()
        raise RuntimeError("sbatch: error: Batch job submission failed: Socket timed out on send/recv operation")

    cluster.on_submit = be_silent_once
    assert len(list(make(files(tmp_path), tmp_path))) == 3
    assert list(cluster.tasks) == ["1_0", "1_1", "1_2", "2_0", "2_1", "2_2"]
    assert cluster.cancelled == ["1_0", "1_1", "1_2"]
    assert len(cluster.names) == 2  # so that the second is found by its name, not the first
    assert json.loads((cluster.home / "array.json").read_text())["jobs"] == ["2_0", "2_1", "2_2"]

    def refuse(ids: list[str]) -> None:
        raise RuntimeError("sbatch: error: invalid partition: big")

    cluster.on_submit = refuse
    (tmp_path / "others").mkdir()
    with pytest.raises(LaunchError, match=r"the array of tokenization jobs cannot be submitted: .*invalid partition"):
        list(make(files(tmp_path / "others"), tmp_path))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("sbatch") is None, reason="there is no SLURM here")
def test_slurm_gives_the_same_bits(tmp_path: Path) -> None:
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
    with pytest.raises(DataError, match=r"a/train/1\.jsonl is damaged \(its text is UTF-16"):
        prepare_data(in_jobs, tmp_path / "bad", tmp_path / "bad")
