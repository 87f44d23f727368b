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

from neox_core.artifact import sha256_of
from neox_core.config import TokenizeJobConfig
from neox_core.data.part_files import PartPaths
from neox_core.data.part_settings import PartSettings, TokenizerSettings
from neox_core.data.readers import InputFile
from neox_core.errors import DataError, LaunchError
from tasks import slurm, tokenize_array
from tasks.tokenize import prepare_data
from tasks.tokenize_array import made_in_jobs
from tests.tasks.test_tokenize import MODEL, contents, small, small_input

SETTINGS = PartSettings(TokenizerSettings(MODEL), None)


class Cluster:
    """Takes arrays, runs a task when it is told to, and answers about states."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.tasks: dict[str, Callable[[], Any]] = {}
        self.states: dict[str, str] = {}
        self.cancelled: list[str] = []
        self.arrays = 0
        self.on_submit: Callable[[list[str]], None] = lambda ids: None
        """What happens to an array's tasks at once."""

    def submit(self, calls: list[Callable[[], Any]]) -> list[Any]:
        self.arrays += 1
        ids = [f"{self.arrays}_{number}" for number in range(len(calls))]
        self.tasks |= dict(zip(ids, calls, strict=True))
        self.states |= dict.fromkeys(ids, "pending")
        self.on_submit(ids)
        return [self.job(self.home, job_id) for job_id in ids]

    def job(self, home: Path, job_id: str) -> Any:
        paths = SimpleNamespace(result_pickle=home / f"{job_id}_0_result.pkl", stdout=home / f"{job_id}_0_log.out")
        return _Job(job_id, paths)

    def run(self, *ids: str) -> None:
        for job_id in ids:
            cloudpickle_dump(("success", self.tasks[job_id]()), self.job(self.home, job_id).paths.result_pickle)
            self.states[job_id] = "completed"


class _Job:
    def __init__(self, job_id: str, paths: Any) -> None:
        self.job_id, self.paths = job_id, paths


class _Executor:
    """The part of submitit's executor that is used."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster

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
        for job, submitted in zip(self.jobs, self.cluster.submit(self.calls), strict=True):
            job.job_id, job.paths = submitted.job_id, submitted.paths


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    made = Cluster(tmp_path / "out" / ".parts" / "jobs")
    made.home.mkdir(parents=True)
    monkeypatch.setattr(tokenize_array, "_executor", lambda home, jobs: _Executor(made))
    monkeypatch.setattr(tokenize_array.submitit, "SlurmJob", made.job)
    monkeypatch.setattr(slurm, "query_state", made.states.__getitem__)
    monkeypatch.setattr(slurm, "cancel", made.cancelled.append)
    for name in ("_POLL_SECONDS", "_ASK_SECONDS", "_SHARED_DISK_SECONDS"):
        monkeypatch.setattr(tokenize_array, name, 0.0)
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
    assert list(cluster.tasks) == ["1_0", "1_1", "1_2", "2_0"]
    assert cluster.cancelled == []


def test_a_part_that_is_gone_is_made_again(cluster: Cluster, tmp_path: Path) -> None:
    inputs = files(tmp_path)
    cluster.on_submit = lambda ids: cluster.run(*ids)
    assert len(list(make(inputs, tmp_path))) == 3
    PartPaths.of(inputs[1], tmp_path / "out").record.unlink()
    assert len(list(make(inputs, tmp_path))) == 3
    assert list(cluster.tasks) == ["1_0", "1_1", "1_2", "2_0"]


def test_tasks_for_other_files_are_cancelled(cluster: Cluster, tmp_path: Path) -> None:
    cluster.submit([list, list])
    (cluster.home / "array.json").write_text(json.dumps({"groups": "other", "jobs": ["1_0", "1_1"]}))
    cluster.on_submit = lambda ids: cluster.run(*ids)
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
    with pytest.raises(LaunchError, match=r"tokenization task 1_0 ended \(failed\) without a result: see .*1_0_0_log"):
        next(make(inputs, tmp_path))
    Path(inputs[0].location).write_bytes(b"\xff\xfe")
    cluster.on_submit = lambda ids: cluster.run(*ids)
    for _ in range(2):  # the second call finds the failure of the first, and tries again
        with pytest.raises(DataError, match=r"0\.jsonl is damaged \(its text is UTF-16 or UTF-32, not UTF-8\)"):
            next(make(inputs, tmp_path))
    assert cluster.arrays == 3


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("sbatch") is None, reason="there is no SLURM here")
def test_slurm_gives_the_same_bits(tmp_path: Path) -> None:
    folder = small_input(
        tmp_path / "in", {f"a/{s}/{n}.jsonl": ["text"] * 99 for s in ("train", "validation") for n in "01"}
    )
    config = small(small_input(folder, {"b/train/0.jsonl": ["x"], "a/test/0.jsonl": ["y"]}))
    jobs = TokenizeJobConfig(parallelism=2, memory_gb=1)
    in_jobs = config.model_copy(update={"data": config.data.model_copy(update={"slurm": jobs})})
    assert prepare_data(in_jobs, tmp_path / "jobs") == prepare_data(config, tmp_path / "here")
    assert contents(tmp_path / "jobs") == contents(tmp_path / "here")
    (folder / "a/train/1.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"a/train/1\.jsonl is damaged \(its text is UTF-16"):
        prepare_data(in_jobs, tmp_path / "bad")
