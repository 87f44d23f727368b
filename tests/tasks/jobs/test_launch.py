from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import cloudpickle
import psutil
import pytest

from neox_core.config import LaunchConfig
from neox_core.errors import LaunchError
from tasks.jobs import local
from tasks.jobs.job import Job
from tasks.jobs.launch import find_job, find_jobs, submit_or_attach
from tasks.jobs.retry import NoAnswer
from tasks.jobs.status import Status
from tests import waiting
from tests.processes import command_of, is_running
from tests.tasks.jobs.slurm.fake_slurm import FakeSlurm

sys.path.insert(0, str(Path(__file__).parent))
import rank_functions

LAUNCH = LaunchConfig(executor="local", ranks_per_node=2, device="cpu", time_limit_minutes=9)
KEY = "0123456789abcdef" * 4

wait_for = partial(waiting.wait_for, seconds=300.0)


@pytest.fixture(autouse=True)
def _jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Rank functions travel by value, and no job outlives its test."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    cloudpickle.register_pickle_by_value(rank_functions)
    yield
    cloudpickle.unregister_pickle_by_value(rank_functions)
    for job in find_jobs(tmp_path / "jobs", ""):
        if job.record.executor == "local":
            job.cancel()


def submit(folder: Path, function: Callable[..., Any], *args: Any, ranks: int = 2, **options: Any) -> Job:
    return submit_or_attach(LAUNCH, folder / "jobs", "test", KEY, function, args, 1, ranks, **options)


def test_two_ranks_meet_and_return_their_results(tmp_path: Path) -> None:
    job = submit(tmp_path, rank_functions.sum_of_ranks, 10)
    assert job.state() == "running"
    assert job.results() == [
        {"sum": 30.0, "RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "DS_ACCELERATOR": "cpu"},
        {"sum": 30.0, "RANK": 1, "LOCAL_RANK": 1, "WORLD_SIZE": 2, "DS_ACCELERATOR": "cpu"},
    ]
    assert job.state() == "completed"
    assert job.done()
    assert all(path.exists() for path in job.log_paths())


def test_the_same_key_is_one_job_while_it_runs_and_after_it_completed(tmp_path: Path) -> None:
    args = (str(tmp_path), str(tmp_path / "go"))
    first = submit(tmp_path, rank_functions.count_starts, *args)
    wait_for(lambda: len(list(tmp_path.glob("start-*"))) == 2)
    second = submit(tmp_path, rank_functions.count_starts, *args)
    assert second.job_id == first.job_id
    (tmp_path / "go").touch()
    assert second.results() == [0, 1]
    assert submit(tmp_path, rank_functions.count_starts, *args).results() == [0, 1]
    found = find_job(tmp_path / "jobs", KEY)
    assert found is not None
    assert found.results() == [0, 1]
    assert len(list(tmp_path.glob("start-*"))) == 2
    assert find_job(tmp_path / "jobs", "f" * 64) is None

    again = submit(tmp_path, rank_functions.count_starts, *args, accept_completed=False)
    assert again.results() == [0, 1]
    assert len(list(tmp_path.glob("start-*"))) == 4


def test_the_message_of_the_rank_that_failed_is_the_error(tmp_path: Path) -> None:
    job = submit(tmp_path, rank_functions.rank_1_rejects_data)
    with pytest.raises(LaunchError) as caught:
        job.results()
    message = str(caught.value)
    assert "failed, rank 1 first: source arxiv is empty: add files or remove it (log: " in message
    assert "\n" not in message
    assert "Traceback" not in message
    assert "DataError" in job.log_paths()[1].read_text()
    assert job.state() == "failed"


def test_a_killed_rank_ends_the_job(tmp_path: Path) -> None:
    job = submit(tmp_path, rank_functions.rank_1_is_killed, str(tmp_path))
    with pytest.raises(LaunchError, match=r"rank 1 first: killed by signal 9.*about to run out of memory.*_1_log"):
        job.results()
    pids = [int((tmp_path / f"pid-{rank}").read_text()) for rank in (0, 1)]
    assert not any(is_running(pid) for pid in pids)


def test_a_failed_job_is_submitted_again(tmp_path: Path) -> None:
    first = submit(tmp_path, rank_functions.fail_once, str(tmp_path), ranks=1)
    with pytest.raises(LaunchError, match="rank 0 first: ValueError: not this time"):
        first.results()
    second = submit(tmp_path, rank_functions.fail_once, str(tmp_path), ranks=1)
    assert second.results() == ["done"]
    assert second.log_paths() != first.log_paths()
    assert first.state() == "failed"


def test_the_time_limit_ends_a_job(tmp_path: Path) -> None:
    launch = LAUNCH.model_copy(update={"time_limit_minutes": 0.1})
    args = (str(tmp_path),)
    job = submit_or_attach(launch, tmp_path / "jobs", "test", KEY, rank_functions.sleep_for_ever, args, 1, 2)
    with pytest.raises(LaunchError, match=r"its time limit is over: run again to go on .*raise time_limit_minutes"):
        job.results()
    assert not any(is_running(int(path.read_text())) for path in tmp_path.glob("pid-*"))


def test_cancel_leaves_no_process(tmp_path: Path) -> None:
    job = submit(tmp_path, rank_functions.sleep_for_ever, str(tmp_path))
    wait_for(lambda: all((tmp_path / f"pid-{rank}").exists() for rank in (0, 1)))
    pids = [int((tmp_path / f"pid-{rank}").read_text()) for rank in (0, 1)] + [int(job.job_id)]
    assert all(is_running(pid) for pid in pids)
    job.cancel()
    assert not any(is_running(pid) for pid in pids)
    assert job.state() == "cancelled"
    with pytest.raises(LaunchError, match="was cancelled"):
        job.results()


def test_a_job_that_is_cancelled_while_it_starts_leaves_no_process(tmp_path: Path) -> None:
    job = submit(tmp_path, time.sleep, 60, ranks=4)
    wait_for(lambda: list(tmp_path.rglob("controller.json")))
    job.cancel()
    assert job.state() == "cancelled"
    assert not [process for process in psutil.process_iter() if str(tmp_path) in " ".join(command_of(process))]


def test_a_rank_whose_controller_died_before_it_began_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLEMMA_CONTROLLER_PID", "1")
    code = "import time; from tasks.jobs.rank import _end_with_controller; _end_with_controller(); time.sleep(600)"
    assert subprocess.run([sys.executable, "-c", code], timeout=300).returncode == 1


def test_ranks_end_when_their_controller_is_killed(tmp_path: Path) -> None:
    job = submit(tmp_path, rank_functions.sleep_for_ever, str(tmp_path))
    wait_for(lambda: all((tmp_path / f"pid-{rank}").exists() for rank in (0, 1)))
    os.kill(int(job.job_id), signal.SIGKILL)
    with pytest.raises(LaunchError, match="ended without a word"):
        job.results()
    assert not any(is_running(int((tmp_path / f"pid-{rank}").read_text())) for rank in (0, 1))


SUBMITTER = """
import os, sys
from pathlib import Path
import cloudpickle
sys.path.insert(0, {tests!r})
import rank_functions
from neox_core.config import LaunchConfig
from tasks.jobs import launch
cloudpickle.register_pickle_by_value(rank_functions)
{before}
config = LaunchConfig(executor="local", ranks_per_node=2, device="cpu", time_limit_minutes=9)
folder = Path({folder!r})
args = (str(folder), str(folder / "go"))
launch.submit_or_attach(config, folder / "jobs", "test", {key!r}, rank_functions.count_starts, args, 1, 2)
os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize("before", ["", "launch.JobRecord.with_ids = lambda *_: os.kill(os.getpid(), 9)"])
def test_a_job_outlives_its_submitter_and_is_found_again(tmp_path: Path, before: str) -> None:
    """Killed after the submission, or between the submission and the record of it."""
    code = SUBMITTER.format(tests=str(Path(__file__).parent), folder=str(tmp_path), key=KEY, before=before)
    submitter = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert submitter.returncode == -signal.SIGKILL, submitter.stderr
    wait_for(lambda: len(list(tmp_path.glob("start-*"))) == 2)

    job = submit(tmp_path, rank_functions.count_starts, str(tmp_path), str(tmp_path / "go"))
    assert job.state() == "running"
    (tmp_path / "go").touch()
    assert job.results() == [0, 1]
    assert len(list(tmp_path.glob("start-*"))) == 2


def test_two_submitters_at_once_make_one_job(tmp_path: Path) -> None:
    code = SUBMITTER.format(tests=str(Path(__file__).parent), folder=str(tmp_path), key=KEY, before="")
    submitters = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
    assert [submitter.wait(timeout=300) for submitter in submitters] == [-9, -9]
    job = submit(tmp_path, rank_functions.count_starts, str(tmp_path), str(tmp_path / "go"))
    (tmp_path / "go").touch()
    assert job.results() == [0, 1]
    assert len(list(tmp_path.glob("start-*"))) == 2
    assert [folder.name for folder in (tmp_path / "jobs" / KEY).glob("attempt-*")] == ["attempt-0001"]


@pytest.mark.parametrize(
    ("changes", "nodes", "message"),
    [
        ({"executor": "slurm"}, 1, "sbatch is not on the PATH"),
        ({}, 2, r"launch\.nodes is 2, but without SLURM there is one"),
        ({"device": "cuda"}, 1, r"launch\.device is cuda with 2 ranks, but this machine has 0 GPUs"),
    ],
)
def test_what_cannot_be_launched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], nodes: int, message: str
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(local, "count_gpus", lambda: 0)
    launch = LAUNCH.model_copy(update=changes)
    with pytest.raises(LaunchError, match=message):
        submit_or_attach(launch, tmp_path, "test", KEY, rank_functions.count_starts, (), nodes, 2)


def test_a_local_job_of_another_host_is_not_guessed_about(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = submit(tmp_path, rank_functions.fail_once, str(tmp_path), ranks=1)
    wait_for(job.done)
    with monkeypatch.context() as patch:
        patch.setattr("socket.gethostname", lambda: "elsewhere")
        with pytest.raises(LaunchError, match=r"started on host .* cannot be watched from elsewhere.*job\.json"):
            submit(tmp_path, rank_functions.fail_once, str(tmp_path), ranks=1)


def submit_to_slurm(folder: Path, **changes: Any) -> Job:
    launch = LaunchConfig(
        nodes=4, ranks_per_node=8, cpus_per_rank=12, partition="big", **{"slurm_parameters": {"qos": "high"}} | changes
    )
    return submit_or_attach(launch, folder / "jobs", "train", KEY, rank_functions.sleep_for_ever, ("x",), 4, 8)


def test_what_slurm_is_asked_for(tmp_path: Path, fake_slurm: FakeSlurm) -> None:
    assert submit_to_slurm(tmp_path).job_id == "42"
    script = (fake_slurm.folder / "submission.sh").read_text()
    for flag in (
        "nodes=4", "ntasks-per-node=8", "gpus-per-node=8", "cpus-per-task=12", "time=1440", "partition=big",
        "qos=high",
    ):  # fmt: skip
        assert f"#SBATCH --{flag}\n" in script
    assert f"#SBATCH --job-name=llemma-train-{KEY[:12]}-" in script
    command = next(line for line in script.splitlines() if line.startswith("srun"))
    assert '--kill-on-bad-exit=1 --cpus-per-task=12 sh -c \'trap "" USR2; exec "$@"\' _ ' in command
    assert f"{sys.executable} -u -m submitit.core._submit" in command


def options(script: str, name: str) -> list[str]:
    lines = (line.removeprefix("#SBATCH --") for line in script.splitlines())
    return [line for line in lines if line.startswith(name)]


@pytest.mark.parametrize(
    "given",
    [
        {"no-requeue": True, "cpus-per-task": 3},
        {"no_requeue": True, "cpus_per_task": 3},
        {"--no-requeue": True, "--cpus-per-task": 3},
    ],
)
def test_options_by_any_name_replace_ours(tmp_path: Path, fake_slurm: FakeSlurm, given: dict[str, Any]) -> None:
    submit_to_slurm(tmp_path, slurm_parameters=given)
    script = (fake_slurm.folder / "submission.sh").read_text()
    assert options(script, "requeue") == []
    assert options(script, "no-") == ["no-requeue"]
    assert options(script, "cpus-per-task") == ["cpus-per-task=3"]
    assert " --cpus-per-task=3 " in script  # srun's


def test_an_option_given_twice() -> None:
    with pytest.raises(ValueError, match="given twice: no-requeue, no_requeue"):
        LaunchConfig(slurm_parameters={"no-requeue": True, "no_requeue": True})


def test_no_gpus_are_asked_for_on_cpus(tmp_path: Path, fake_slurm: FakeSlurm) -> None:
    submit_to_slurm(tmp_path, device="cpu")
    script = (fake_slurm.folder / "submission.sh").read_text()
    assert "--gpus" not in script
    assert script.index("export DS_ACCELERATOR=cpu\n") < script.index("\nsrun")


@pytest.mark.parametrize(
    ("answer", "state", "words"),
    [
        (("COMPLETED",), "completed", "it has completed, but left no result"),
        (("CANCELLED by 0",), "cancelled", "was cancelled: run again to go on .*CANCELLED by 0"),
        (("FAILED", "3:0", "3:0"), "failed", r"without a word from any rank.*\(SLURM: FAILED, exit code 3:0\)"),
        (("TIMEOUT",), "failed", r"its time limit is over: .*raise time_limit_minutes \(SLURM: TIMEOUT\)"),
        (("NODE_FAIL", "0:0", "0:0", "node7 down"), "failed", r"a node failed: .*\(SLURM: NODE_FAIL, node7 down\)"),
        (("OUT_OF_MEMORY", "0:125"), "failed", r"more main memory than it may: .*OUT_OF_MEMORY, exit code 0:125"),
        (("PREEMPTED",), "failed", "a job of higher priority took its place: run again"),
    ],
)
def test_slurm_answers_decide_the_state(
    tmp_path: Path,
    fake_slurm: FakeSlurm,
    monkeypatch: pytest.MonkeyPatch,
    answer: tuple[str, ...],
    state: str,
    words: str,
) -> None:
    monkeypatch.setattr("tasks.jobs.job._SHARED_DISK_SECONDS", 0.0)
    job = submit_to_slurm(tmp_path)
    fake_slurm.squeue("PENDING", "Resources")
    assert (job.state(), str(job.status())) == ("pending", "pending (Resources)")
    fake_slurm.squeue("RUNNING")
    assert job.state() == "running"
    fake_slurm.sacct("NODE_FAIL")
    assert job.state() == "failed"
    fake_slurm.squeue("RUNNING")  # SLURM has requeued it
    assert job.state() == "running"
    fake_slurm.sacct(*answer)
    assert job.state() == state
    with pytest.raises(LaunchError, match=rf"job 42 \(llemma-train-0123456789ab-\w+\) .*{words}"):
        job.results()


@pytest.mark.parametrize(
    ("log", "words"),
    [
        (
            "x\nsrun: error: node1: task 1: Killed\nsrun: error: node2: tasks 0,2-3: Terminated\n",
            "rank 1 first: killed",
        ),
        ("slurmstepd-node1: error: Exceeded job memory limit\n", "more main memory than it may"),
        ("srun: error: Node failure on node4\n", "a node failed"),
        ("nothing", "without a word"),
    ],
)
def test_the_log_decides_where_accounting_says_failed_only(
    tmp_path: Path, fake_slurm: FakeSlurm, log: str, words: str
) -> None:
    job = submit_to_slurm(tmp_path)
    job.log_paths()[0].write_text(log)
    fake_slurm.sacct("FAILED", "15:0", "0:15")
    with pytest.raises(LaunchError, match=rf"{words}.*\(SLURM: FAILED, exit code 0:15\)"):
        job.results()


def test_when_slurm_does_not_answer_nothing_is_submitted(tmp_path: Path, fake_slurm: FakeSlurm) -> None:
    job = submit_to_slurm(tmp_path)
    fake_slurm.answer("squeue", "", "slurm_load_jobs error: Unable to contact slurm controller", 1)
    with pytest.raises(LaunchError, match=r"squeue does not answer about jobs 42: .*Unable to contact"):
        job.state()
    with pytest.raises(LaunchError, match="squeue does not answer"):
        submit_to_slurm(tmp_path)
    fake_slurm.squeue("PENDING")
    assert submit_to_slurm(tmp_path).job_id == "42"
    assert (fake_slurm.folder / "submissions").read_text() == "x\n"


def test_a_slurm_job_whose_submitter_died_is_found_by_its_name(
    tmp_path: Path, fake_slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after sbatch, before the id was noted down."""

    def kill(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("tasks.jobs.launch.JobRecord.with_ids", kill)
        with pytest.raises(KeyboardInterrupt):
            submit_to_slurm(tmp_path)
    fake_slurm.squeue_finds("42")
    fake_slurm.squeue("RUNNING")
    job = submit_to_slurm(tmp_path)
    assert (job.job_id, job.state()) == ("42", "running")
    assert (fake_slurm.folder / "submissions").read_text() == "x\n"


def test_cancel_asks_slurm(tmp_path: Path, fake_slurm: FakeSlurm) -> None:
    job = submit_to_slurm(tmp_path)
    fake_slurm.squeue("RUNNING")
    job.cancel()
    assert (fake_slurm.folder / "scancel.args").read_text() == "42\n"


def test_a_refused_submission_says_why(tmp_path: Path, fake_slurm: FakeSlurm) -> None:
    refusal = "echo 'sbatch: error: Batch job submission failed: Job violates accounting/QOS policy' >&2; exit 1"
    (fake_slurm.folder / "sbatch").write_text(f"#!/bin/sh\ntest $1 = --test-only || {{ {refusal}; }}\n")
    with pytest.raises(LaunchError, match=r"llemma-train-0123456789ab-\w+ cannot be submitted: .*violates accounting"):
        submit_to_slurm(tmp_path)


def test_a_hang_ends_the_job_with_every_ranks_stack(tmp_path: Path) -> None:
    job = submit(tmp_path, rank_functions.rank_1_hangs, str(tmp_path), 4.0)
    with pytest.raises(
        LaunchError, match=r"failed, rank [01] first: ended with exit code 75 .*no rank made progress for"
    ):
        job.results()
    # A rank that waits for one that makes progress is no hang.
    assert {path.name for path in tmp_path.glob("waited-*")} == {"waited-0", "waited-1"}
    logs = [path.read_text() for path in job.log_paths()]
    for log in logs:
        assert re.search(r"line \d+ in rank_1_hangs", log), log
        assert "because of rank 1 (launch.hang_timeout_minutes)" in log, log
        assert "they were at: step 3, waiting for other ranks: rank 0; step 3, in rank_1_hangs (" in log, log
    assert "in all_reduce" in logs[0], logs[0]
    assert "in all_reduce" not in logs[1], logs[1]


def test_who_follows_a_job_bears_silence(tmp_path: Path, fake_slurm: FakeSlurm) -> None:
    job = submit_to_slurm(tmp_path)
    fake_slurm.squeue("RUNNING")
    fake_slurm.be_silent("squeue", 2)
    states = job.while_at_work()
    assert [next(states) for _ in range(3)] == [None, None, Status("running")]
    fake_slurm.sacct("FAILED")
    fake_slurm.be_silent("sacct", 1)
    assert list(states) == [None]
    fake_slurm.be_silent("squeue", 2)
    with pytest.raises(LaunchError, match=r"job 42 \(llemma-train-0123456789ab-\w+\) failed"):
        job.results()


def test_a_submission_that_got_no_answer_is_made_again(tmp_path: Path, fake_slurm: FakeSlurm) -> None:
    """SLURM may have taken the job all the same: it knows no work, and is cancelled."""
    sbatch = (fake_slurm.folder / "sbatch").read_text()
    (fake_slurm.folder / "sbatch").write_text(
        "#!/bin/sh\necho 'sbatch: error: Batch job submission failed: Socket timed out on send/recv operation' >&2\n"
        "exit 1\n"
    )
    with pytest.raises(NoAnswer, match=r"llemma-train-0123456789ab-\w+ cannot be submitted, SLURM does not .*Socket"):
        submit_to_slurm(tmp_path)
    (fake_slurm.folder / "sbatch").write_text(sbatch)
    fake_slurm.squeue_finds("41")
    assert submit_to_slurm(tmp_path).job_id == "42"
    assert (fake_slurm.folder / "scancel.args").read_text() == "41\n"
    fake_slurm.squeue("RUNNING")
    assert submit_to_slurm(tmp_path).job_id == "42"
    assert (fake_slurm.folder / "submissions").read_text() == "x\n"
