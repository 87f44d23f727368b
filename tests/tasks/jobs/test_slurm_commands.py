"""What is asked of SLURM, and how its silence is borne, with stand-ins for its commands."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from neox_core.errors import LaunchError
from tasks.jobs import slurm
from tests.tasks.jobs.fake_slurm import FakeSlurm


def test_what_is_asked_of_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    programs = {
        "squeue": 'echo "12_0 RUNNING"; echo "12_1 PENDING"; echo "34 COMPLETED"',
        "sacct": 'echo "JobID|State|NodeList"; echo "12_[4-5]|CANCELLED by 0|n"; echo "12_2|TIMEOUT|n"',
    }
    for name, text in programs.items():
        (tmp_path / name).write_text(f'#!/bin/sh\necho "$@" >>{tmp_path}/{name}.args\n{text}\n')
        (tmp_path / name).chmod(0o755)
    assert slurm.task_states(["12_0", "12_1", "12_2", "12_3", "12_5", "34"]) == {
        "12_0": "running", "12_1": "pending", "12_2": "failed", "12_3": "unknown", "12_5": "cancelled",
        "34": "completed",
    }  # fmt: skip
    assert (tmp_path / "squeue.args").read_text() == "--noheader --array --states=all --jobs=12,34 --format=%i %T\n"
    assert (tmp_path / "sacct.args").read_text() == "--format=JobID,State --parsable2 --jobs=12\n"
    assert slurm.task_states([]) == {}
    (tmp_path / "squeue").write_text('#!/bin/sh\ncase "$*" in *--name=x*--format=%F) printf "12\\n12\\n";; esac\n')
    assert slurm.find_by_name("x") == "12"  # the array's; %A would be the id of one of its tasks
    for reason, answers in (("Invalid job id specified", True), ("Socket timed out", False)):
        (tmp_path / "squeue").write_text(f"#!/bin/sh\necho 'slurm_load_jobs error: {reason}' >&2; exit 1\n")
        if answers:
            assert slurm.task_states(["12_2"]) == {"12_2": "failed"}
        else:
            with pytest.raises(LaunchError, match=r"squeue does not answer about jobs 12: .*Socket timed out"):
                slurm.task_states(["12_2"])


def test_a_failing_sacct_is_no_answer(fake_slurm: FakeSlurm) -> None:
    fake_slurm.sacct("COMPLETED")
    fake_slurm.be_silent("sacct", 2)
    with pytest.raises(slurm.NoAnswer, match=r"sacct does not answer about jobs 42: .*Socket timed out"):
        slurm.query_state("42")
    with pytest.raises(slurm.NoAnswer):
        slurm.task_states(["42"])
    assert slurm.query_state("42") == "completed"
    fake_slurm.answer("sacct", "", "Slurm accounting storage is disabled", 1)
    assert slurm.query_state("42") == "unknown"
    (fake_slurm.folder / "squeue").unlink()
    (fake_slurm.folder / "squeue").mkdir()  # a file system's hiccup
    with pytest.raises(slurm.NoAnswer, match="squeue does not answer"):
        slurm.query_state("42")


def test_some_silence_is_borne(fake_slurm: FakeSlurm, caplog: pytest.LogCaptureFixture) -> None:
    fake_slurm.answer("squeue", "RUNNING\n")
    retry_policy, meanwhile = slurm.RetryPolicy(), list[str]()
    for _ in range(2):  # an answer ends the count
        fake_slurm.be_silent("squeue", slurm._UNANSWERED - 1)
        assert retry_policy.wait_for(lambda: slurm.query_state("42"), lambda: meanwhile.append("x")) == "running"
    assert len(meanwhile) == 2 * (slurm._UNANSWERED - 1)
    assert "job 42: slurm_load_jobs error: Socket timed out: try again (59 of 60 times)" in caplog.text
    fake_slurm.be_silent("squeue", slurm._UNANSWERED)
    with pytest.raises(LaunchError, match=r"Socket timed out.*asked 60 times; what runs in SLURM goes on") as caught:
        retry_policy.wait_for(lambda: slurm.query_state("42"))
    assert not isinstance(caught.value, slurm.NoAnswer)  # nobody else's retry_policy begins with it


def test_a_silent_slurm_is_not_asked_all_the_time(fake_slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm, "_SILENCE_SECONDS", 60.0)
    now = 1000.0
    monkeypatch.setattr(slurm.time, "monotonic", lambda: now)
    fake_slurm.answer("squeue", "RUNNING\n")
    fake_slurm.be_silent("squeue", 1)
    retry_policy = slurm.RetryPolicy()
    assert [retry_policy.ask(lambda: slurm.query_state("42")) for _ in range(9)] == [None] * 9
    assert fake_slurm.questions("squeue") == 1
    now += 60
    assert [retry_policy.ask(lambda: slurm.query_state("42")) for _ in range(2)] == ["running"] * 2
    assert fake_slurm.questions("squeue") == 3


def test_patience_is_with_silence_only(fake_slurm: FakeSlurm) -> None:
    def question() -> str:
        raise LaunchError("job 1 was started on another host")

    with pytest.raises(LaunchError, match="another host"):
        slurm.RetryPolicy().ask(question)
