"""Training goes on after losses and kills, and ends with the very numbers of a training that nobody disturbed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from flows.train import train
from infra.s3.service import storage_service
from neox_core.artifact import read_artifact
from neox_core.checkpoint.manifest import checkpoint_key, list_checkpoints, object_key
from neox_core.errors import LaunchError
from neox_core.storage.object_store import ObjectStore
from tasks.identity.training import resolve_training
from tasks.jobs.node.report import ControllerReport
from tests import waiting
from tests.e2e.conftest import Chain
from tests.e2e.runs import INTERVAL, STEPS, Run, training_values
from tests.meanwhile import meanwhile

pytestmark = pytest.mark.e2e

PREPARED = (".current", "prepare-data-*", "convert-*")

wait_for = partial(waiting.wait_for, seconds=400.0)


def prefix_of(run: Run) -> str:
    return resolve_training(run.config).prefix


def test_training_resumes_from_s3_alone(chain: Chain, copied: Callable[..., Run]) -> None:
    run = copied(*PREPARED, "s3")
    with storage_service(run.config.storage, run.workdir) as storage:
        store = ObjectStore(storage)
        assert [manifest.step for manifest in list_checkpoints(store, prefix_of(run))] == [INTERVAL, STEPS]
        store.delete([info.key for info in store.list(object_key(prefix_of(run), checkpoint_key(STEPS), ""))])
        result = train(str(run.path))
        assert [manifest.step for manifest in list_checkpoints(store, prefix_of(run))] == [INTERVAL, STEPS]

    assert not result.skipped
    assert result.artifact.summary["started_from_step"] == INTERVAL
    first, second = chain.run.rows(), run.rows()
    assert second[: len(first)] == first  # what was logged before came back from the store
    again = second[len(first) :]
    assert {row["step"] for row in again} == set(range(INTERVAL + 1, STEPS + 1))
    assert training_values(again, 0) == training_values(first, INTERVAL + 1)
    assert result.artifact.summary["first_loss"] == chain.run.rows()[1]["train/loss"]


def when_training_is_under_way(run: Run, store: ObjectStore, act: Callable[[ControllerReport], None]) -> None:
    """Act once the first checkpoint is complete and a later step is logged, long before the last is saved."""
    metrics = resolve_training(run.config).scratch / "metrics.jsonl"

    def is_under_way() -> bool:
        logged = metrics.is_file() and f'{{"step": {INTERVAL + 1},' in metrics.read_text()
        # The store is asked late: it runs on the same cores.
        return logged and bool(list_checkpoints(store, prefix_of(run)))

    wait_for(is_under_way, pause=0.02)
    report = ControllerReport.read(run.attempts("train")[-1])
    assert report is not None
    act(report)


@contextmanager
def rank_1_killed_when_under_way(run: Run, store: ObjectStore) -> Iterator[None]:
    act: Callable[[ControllerReport], None] = lambda report: report.ranks[1].send(signal.SIGKILL)  # noqa: E731
    with meanwhile(partial(when_training_is_under_way, run, store, act)):
        yield


def test_a_killed_rank_ends_the_job_and_the_next_run_resumes(chain: Chain, copied: Callable[..., Run]) -> None:
    run = copied(*PREPARED)
    with storage_service(run.config.storage, run.workdir) as storage:
        store = ObjectStore(storage)
        with (
            rank_1_killed_when_under_way(run, store),
            pytest.raises(
                LaunchError, match=r"failed, rank 1 first: killed by signal 9 without a Python error"
            ) as error,
        ):
            train(str(run.path), ["launch.max_restarts=0", "launch.restarts_in_place=0"])
        assert "\n" not in str(error.value)
        assert not any(record.is_alive() for record in run.job_processes())
        assert [manifest.step for manifest in list_checkpoints(store, prefix_of(run))] == [INTERVAL]

        result = train(str(run.path))
    assert result.artifact.summary["started_from_step"] == INTERVAL
    assert training_values(run.rows(), 0) == training_values(chain.run.rows(), 0)
    assert [attempt.name for attempt in run.attempts("train")] == ["attempt-0001", "attempt-0002"]


def test_a_training_goes_on_in_its_job_after_a_rank_was_killed(chain: Chain, copied: Callable[..., Run]) -> None:
    run = copied(*PREPARED)
    with (
        storage_service(run.config.storage, run.workdir) as storage,
        rank_1_killed_when_under_way(run, ObjectStore(storage)),
    ):
        result = train(str(run.path))
    # The newest copy on the node's disk, which may be the last: steps are shorter than the upload that was waited for.
    assert result.artifact.summary["started_from_step"] in (INTERVAL, STEPS)
    assert training_values(run.rows(), 0) == training_values(chain.run.rows(), 0)
    assert [attempt.name for attempt in run.attempts("train")] == ["attempt-0001"]


def start_command(run: Run, log: Path) -> subprocess.Popen[bytes]:
    """`llemma run` as a user starts it, with a Prefect server of its own. (That would keep a pipe open.)"""
    hidden = ("PREFECT_", "AWS_")  # those of this test session
    environment = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
    command = [str(Path(sys.executable).with_name("llemma")), "run", str(run.path)]
    with log.open("wb") as output:
        return subprocess.Popen(command, env=environment, stdout=output, stderr=output)


def test_a_killed_flow_leaves_a_job_that_the_next_run_follows(
    chain: Chain, copied: Callable[..., Run], tmp_path: Path
) -> None:
    run = copied(*PREPARED)
    killed = start_command(run, tmp_path / "killed.log")
    wait_for(lambda: killed.poll() is not None or run.attempts("train"))
    assert killed.poll() is None, (tmp_path / "killed.log").read_text()
    with storage_service(run.config.storage, run.workdir) as storage:
        when_training_is_under_way(run, ObjectStore(storage), lambda report: killed.kill())
        assert killed.wait() == -signal.SIGKILL, (tmp_path / "killed.log").read_text()
        second = start_command(run, tmp_path / "second.log")
        code = second.wait()
    output = (tmp_path / "second.log").read_text()
    assert code == 0, output
    assert "training loss" in output
    assert training_values(run.rows(), 0) == training_values(chain.run.rows(), 0)
    evaluations = read_artifact(run.stage_folder("evaluate")).summary["evaluations"]
    assert evaluations == read_artifact(chain.run.stage_folder("evaluate")).summary["evaluations"]
    assert [attempt.name for attempt in run.attempts("train")] == ["attempt-0001"]
    assert run.processes() == []
