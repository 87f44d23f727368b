"""What is asked of SLURM, and how its silence is borne, with stand-ins for its commands."""

from __future__ import annotations

from datetime import datetime

import pytest

from neox_core.errors import LaunchError
from tasks.jobs import retry
from tasks.jobs.registry import choose_executor
from tasks.jobs.slurm import commands as slurm
from tests.tasks.jobs.slurm.fake_slurm import FakeSlurm


def state(job: str = "42") -> str:
    return slurm.task_states([job])[job].state


def test_when_a_jobs_time_is_over(fake_slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_slurm.answer("squeue", "2026-11-28T20:53:39\n")
    assert slurm.end_of("42") == datetime(2026, 11, 28, 20, 53, 39).timestamp()
    for answer in ("N/A\n", ""):
        fake_slurm.answer("squeue", answer)
        assert slurm.end_of("42") is None
    monkeypatch.setenv("PATH", "")
    assert slurm.end_of("42") is None


def test_what_is_asked_of_slurm(fake_slurm: FakeSlurm) -> None:
    fake_slurm.answer("squeue", "12_0|RUNNING|None\n12_1|PENDING|Priority\n34|COMPLETED|None\n")
    rows = ("12_[4-5,7%3]|CANCELLED by 0", "12_2|TIMEOUT", "34|COMPLETED")
    fake_slurm.answer("sacct", "".join(f"{row}|0:0|0:0|None\n" for row in rows))
    tasks = ["12_0", "12_1", "12_2", "12_3", "12_5", "12_7", "34"]
    assert {task: str(status) for task, status in slurm.task_states(tasks).items()} == {
        "12_0": "running",
        "12_1": "pending (Priority)",
        "12_2": "failed (SLURM: TIMEOUT)",
        "12_3": "unknown",
        "12_5": "cancelled (SLURM: CANCELLED by 0)",
        "12_7": "cancelled (SLURM: CANCELLED by 0)",
        "34": "completed",
    }
    asked = {name: (fake_slurm.folder / f"{name}.args").read_text() for name in ("squeue", "sacct")}
    assert asked["squeue"] == "--noheader --array --states=all --jobs=12,34 --format=%i|%T|%r\n"
    assert asked["sacct"] == (
        "--allocations --noheader --parsable2 --format=JobID,State,ExitCode,DerivedExitCode,Reason --jobs=12,34\n"
    )
    assert slurm.task_states([]) == {}
    fake_slurm.squeue_finds("12", "12")
    assert slurm.find_by_name("x") == "12"
    assert "--name=x --format=%F" in (fake_slurm.folder / "squeue.args").read_text()  # %A: the id of one of its tasks


def test_an_unknown_job_is_looked_up_and_silence_is_no_answer(fake_slurm: FakeSlurm) -> None:
    fake_slurm.sacct("TIMEOUT")
    assert state() == "failed"
    fake_slurm.answer("squeue", "", "slurm_load_jobs error: Socket timed out", 1)
    with pytest.raises(LaunchError, match=r"squeue does not answer about jobs 42: .*Socket timed out"):
        state()


def test_what_squeue_saw_end_counts_until_accounting_knows(fake_slurm: FakeSlurm) -> None:
    fake_slurm.squeue("PREEMPTED")
    assert str(slurm.task_states(["42"])["42"]) == "failed (SLURM: PREEMPTED)"
    fake_slurm.answer("sacct", "", "Slurm accounting storage is disabled", 1)
    assert str(slurm.task_states(["42"])["42"]) == "failed (SLURM: PREEMPTED)"


def test_a_failing_sacct_is_no_answer(fake_slurm: FakeSlurm) -> None:
    fake_slurm.sacct("COMPLETED")
    fake_slurm.be_silent("sacct", 2)
    for _ in range(2):
        with pytest.raises(retry.NoAnswer, match=r"sacct does not answer about jobs 42: .*Socket timed out"):
            state()
    assert state() == "completed"
    fake_slurm.answer("sacct", "", "Slurm accounting storage is disabled", 1)
    assert state() == "unknown"
    (fake_slurm.folder / "squeue").unlink()
    (fake_slurm.folder / "squeue").mkdir()  # a file system's hiccup
    with pytest.raises(retry.NoAnswer, match="squeue does not answer"):
        state()


@pytest.mark.parametrize(
    ("answer", "chosen"),
    [
        ("echo 'Slurmctld(primary) at head is UP'", "slurm"),
        ("echo 'Slurmctld(primary) at head is DOWN'; echo 'Slurmctld(backup) at head2 is UP'", "slurm"),
        ("echo 'Slurmctld(primary) at head is DOWN'; exit 1", "local"),
        ("echo 'scontrol: error: resolve_ctls_from_dns_srv: res_nsearch error: Unknown host' >&2; exit 1", "local"),
        ("exec sleep 60", "local"),
    ],
    ids=["up", "backup", "down", "not configured", "hangs"],
)
def test_auto_asks_whether_a_controller_answers(
    fake_slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch, answer: str, chosen: str
) -> None:
    if chosen == "local":  # the others answer, however late on a busy machine
        monkeypatch.setattr(slurm, "_PING_SECONDS", 1.0)
    (fake_slurm.folder / "scontrol").write_text(f"#!/bin/sh\n{answer}\n")
    assert choose_executor("auto") == chosen
    assert choose_executor("slurm") == "slurm"


def test_some_silence_is_borne(fake_slurm: FakeSlurm, caplog: pytest.LogCaptureFixture) -> None:
    fake_slurm.squeue("RUNNING")
    retry_policy, meanwhile = retry.SchedulerRetry(), list[str]()
    for _ in range(2):  # an answer ends the count
        fake_slurm.be_silent("squeue", retry._UNANSWERED - 1)
        assert retry_policy.wait_for(state, lambda: meanwhile.append("x")) == "running"
    assert len(meanwhile) == 2 * (retry._UNANSWERED - 1)
    assert "jobs 42: slurm_load_jobs error: Socket timed out: try again (59 of 60 times)" in caplog.text
    fake_slurm.be_silent("squeue", retry._UNANSWERED)
    with pytest.raises(LaunchError, match=r"Socket timed out.*asked 60 times; what runs in SLURM goes on") as caught:
        retry_policy.wait_for(state)
    assert not isinstance(caught.value, retry.NoAnswer)  # nobody else's patience begins with it


def test_a_silent_slurm_is_not_asked_all_the_time(fake_slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "_SILENCE_SECONDS", 60.0)
    now = 1000.0
    monkeypatch.setattr(retry.time, "monotonic", lambda: now)
    fake_slurm.squeue("RUNNING")
    fake_slurm.be_silent("squeue", 1)
    retry_policy = retry.SchedulerRetry()
    assert [retry_policy.ask(state) for _ in range(9)] == [None] * 9
    assert fake_slurm.questions("squeue") == 1
    now += 60
    assert [retry_policy.ask(state) for _ in range(2)] == ["running"] * 2
    assert fake_slurm.questions("squeue") == 3


def test_only_silence_is_borne(fake_slurm: FakeSlurm) -> None:
    def question() -> str:
        raise LaunchError("job 1 was started on another host")

    with pytest.raises(LaunchError, match="another host"):
        retry.SchedulerRetry().ask(question)
