"""A job that ends before its time is submitted again, as long as that brings it further."""

from __future__ import annotations

from pathlib import Path

import pytest

from neox_core.errors import LaunchError, LlemmaError, StorageError, TrainingError
from tasks.jobs import restarts
from tasks.jobs.executor import Resources
from tasks.jobs.failure import JobFailed
from tasks.jobs.job import Job
from tasks.jobs.launch import JobPlan, attach_or_submit
from tasks.jobs.registry import register_executor
from tasks.jobs.restarts import run_to_end
from tests.tasks.jobs.scripted_executor import ScriptedExecutor


def answer() -> str:
    return "trained"


def refuse() -> str:
    raise TrainingError("the loss is not finite: lower the rate")


def lose_the_store() -> str:
    raise StorageError("the store does not answer")


class Cluster:
    """Ends each attempt as it is told to, after the given checkpoint was saved."""

    def __init__(self, folder: Path, *attempts: tuple[str, int], function: object = answer) -> None:
        self.folder, self.attempts, self.function = folder, list(attempts), function
        self.scheduler = ScriptedExecutor()
        register_executor("scripted", lambda: self.scheduler)
        self.step, self.told = 0, list[str]()

    def submit(self) -> Job:
        calls = [(self.function, ())]
        plan = JobPlan(self.folder, "train", "0123456789ab", calls, Resources(), "scripted")  # type: ignore[arg-type]
        return attach_or_submit(plan)

    def follow(self, job: Job) -> None:
        ending, self.step = self.attempts.pop(0)
        if ending == "run":
            try:
                self.scheduler.run(job.job_id)
            except LlemmaError:
                self.scheduler.end("failed", job.job_id)
        else:
            self.scheduler.end(ending, job.job_id)

    def run(self, max_restarts: int) -> list[object]:
        return run_to_end(self.submit, self.follow, lambda: self.step, max_restarts, self.told.append)


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restarts, "_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(restarts, "_WAKE_SECONDS", 0.01)


def test_it_goes_on_as_long_as_checkpoints_come(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, ("timeout", 4), ("failed", 8), ("timeout", 12), ("timeout", 16), ("run", 20))
    assert cluster.run(max_restarts=1) == ["trained"]
    assert len(cluster.scheduler.by_name) == 5
    assert "its time limit is over" in cluster.told[0]
    assert "submitting it again (1 of 1 times without a new checkpoint)" in cluster.told[-1]


def test_it_stops_with_all_reasons_where_none_comes(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, ("failed", 4), ("timeout", 8), ("failed", 8), ("failed", 8), ("run", 9))
    with pytest.raises(JobFailed, match=r"it ended 3 times without a new checkpoint.*launch.max_restarts 2") as error:
        cluster.run(max_restarts=2)
    assert str(error.value).count("job 2 ") == 1  # of the attempt that began the standstill
    assert "(1) job 2" in str(error.value)
    assert "(2) job 3" in str(error.value)
    assert "job 1 " not in str(error.value)


def test_without_restarts_the_message_is_the_jobs(tmp_path: Path) -> None:
    with pytest.raises(JobFailed, match=r"^job 1 \(llemma-train-0123456789ab-\w+\) failed: its time limit is over"):
        Cluster(tmp_path, ("timeout", 0)).run(max_restarts=0)


@pytest.mark.parametrize(
    ("attempt", "function", "submissions"),
    [(("cancelled", 4), answer, 1), (("run", 4), refuse, 1), (("run", 4), lose_the_store, 2)],
)
def test_what_was_cancelled_or_refuses_stays_ended(
    tmp_path: Path, attempt: tuple[str, int], function: object, submissions: int
) -> None:
    cluster = Cluster(tmp_path, attempt, ("cancelled", 4), function=function)
    with pytest.raises(LaunchError):
        cluster.run(max_restarts=5)
    assert len(cluster.scheduler.by_name) == submissions
