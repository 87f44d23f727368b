"""Training stops where all ranks agree and goes on from there: at a signal, near its time limit, without its store."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch.distributed as dist

from neox_core.checkpoint.conversion.convert import convert
from neox_core.checkpoint.conversion.toy_base import make_random_base
from neox_core.checkpoint.manifest import list_checkpoints
from neox_core.config import RunConfig, StorageConfig
from neox_core.storage.object_store import ObjectStore
from neox_core.train.ends.stopping import LOCAL_END_TIME, Stop, Stopping, end_time
from neox_core.train.job import TrainJob
from neox_core.train.resuming.local_copy import newest_local
from tests import waiting
from tests.distributed import PATIENCE_SECONDS, killed_ranks, rendezvous_ports, run_ranks
from tests.faulty_s3 import faulty_s3
from tests.neox_core.train.small_jobs import rows, train_job, write_data
from tests.neox_core.train.test_rollback import config

STEPS, INTERVAL = 8, 4

wait_for = partial(waiting.wait_for, seconds=PATIENCE_SECONDS / 2, pause=0.1)


def small_config(storage: StorageConfig) -> RunConfig:
    return config(storage, steps=STEPS, checkpoint_interval=INTERVAL)


def prepare(run: RunConfig, folder: Path) -> TrainJob:
    write_data(folder / "data")
    make_random_base(run.model, folder / "base", seed=7)
    convert(folder / "base", folder / "weights", run.model, run.parallel)
    return TrainJob(folder / "data", folder / "weights", folder / "whole", "a" * 64)


@contextmanager
def after_step(step: int, act: Callable[[], None]) -> Iterator[None]:
    """Act on this rank when a step was done, before its state is saved."""
    from neox_core.train.loop import Loop

    whole = Loop._between

    def between(self: Loop, state: Any) -> bool:
        if state.step == step:
            act()
        return whole(self, state)

    with patch.object(Loop, "_between", between):
        yield


def stopped_jobs(config: RunConfig, whole: TrainJob, stopped: TrainJob, ports: list[int]) -> list[Any]:
    """A job that nobody disturbs; one that gets SIGTERM, one near its time limit, and one to the end."""
    found = [train_job(config, whole, None, ports[0])]

    def signalled() -> None:
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)

    with after_step(1, signalled):
        found.append(train_job(config, stopped, None, ports[1]))
    os.environ[LOCAL_END_TIME] = str(time.time() + 5)
    with after_step(5, lambda: time.sleep(5)):
        found.append(train_job(config, stopped, None, ports[2]))
    del os.environ[LOCAL_END_TIME]
    found.append(train_job(config, stopped, None, ports[3]))
    return found


def test_signals_and_time_limits_lead_to_a_save_and_nothing_is_repeated(
    storage_config: StorageConfig, store: ObjectStore, tmp_path: Path
) -> None:
    run = small_config(storage_config)
    whole = prepare(run, tmp_path)
    stopped = replace(whole, fingerprint="b" * 64, output=tmp_path / "stopped")
    steps = []
    for found in run_ranks(stopped_jobs, 2, run, whole, stopped, rendezvous_ports(4)):
        assert found[0] == (0, list(range(1, STEPS + 1)))
        assert "which is saved: rank 1 received SIGTERM; run again to go on" in found[1][0]
        assert "s are left of the time limit, and some steps and a save take" in found[2][0]
        steps.append([begun for _, begun in found[1:]])
    assert steps[0] == steps[1]  # all ranks stop at the same step
    assert [step for begun in steps[0] for step in begun] == list(range(1, STEPS + 1))
    assert all(steps[0])
    saved = [manifest.step for manifest in list_checkpoints(store, stopped.prefix)]
    assert {begun[-1] for begun in steps[0]} <= set(saved)
    values = [{step: row["train/loss"] for step, row in rows(job).items()} for job in (whole, stopped)]
    assert values[0] == values[1]


def without_store(config: RunConfig, served: RunConfig, job: TrainJob, ports: list[int]) -> list[Any]:
    """The store goes away with the first save and is given up; then a job has a store that works."""

    def until_given_up() -> None:
        from neox_core.parallel.ranks.shared_store import shared_store

        channel = shared_store("stopping")
        wait_for(lambda: channel.check(["request"]))

    with after_step(INTERVAL + 1, until_given_up):
        found = [train_job(config, job, None, ports[0])]
    local = newest_local(job.output / "checkpoints", job.fingerprint)
    meet(job.output, len(ports))
    return [*found, local.step if local else None, train_job(served, job, None, ports[1])]


def meet(folder: Path, count: int) -> None:
    """Wait until this many ranks are here, which have no process group now."""
    (folder / f"here-{os.environ['RANK']}").touch()
    wait_for(lambda: len(list(folder.glob("here-*"))) >= count)


def test_a_store_that_stays_away_ends_the_job_with_a_checkpoint_on_disk(
    storage_config: StorageConfig, store: ObjectStore, tmp_path: Path
) -> None:
    run = small_config(storage_config)
    job = prepare(run, tmp_path)
    with faulty_s3(str(storage_config.endpoint_url)) as proxy:
        proxy.trigger = (f"global_step{INTERVAL}-1/", "503")
        storage = storage_config.model_copy(update={"endpoint_url": proxy.url, "patience_minutes": 0.02})
        away = run.model_copy(update={"storage": storage})
        results = run_ranks(without_store, 2, away, run, job, rendezvous_ports(2))
    for (message, begun), local, (started, again) in results:
        assert "gave up after" in message
        assert f"bucket {store.bucket}, key some/prefix/{job.prefix}/" in message
        assert "last answer: " in message
        assert "SlowDown" in message
        assert "\n" not in message
        assert local == begun[-1] > INTERVAL
        assert (started, again) == (local, list(range(local + 1, STEPS + 1)))
    # What was on local disk only came to the store.
    assert [manifest.step for manifest in list_checkpoints(store, job.prefix)] == [results[0][1], STEPS]
    assert newest_local(job.output / "checkpoints", job.fingerprint) is None


@pytest.mark.parametrize(("ahead", "expected"), [(0, [2, 2]), (1, [2, 2])])
def test_ranks_that_are_apart_stop_at_the_same_boundary(ahead: int, expected: list[int]) -> None:
    channel = dist.HashStore()
    ranks = [Stopping(channel, rank, 2, None) for rank in range(2)]
    boundaries = [0, 0]
    ranks[1].request(Stop("interrupted", "a test"))
    stops: list[Stop | None] = [None, None]
    for boundary in range(1, 6):
        for rank, number in ((1, boundary + ahead), (0, boundary)):
            while boundaries[rank] < number and stops[rank] is None:
                boundaries[rank] += 1
                stops[rank] = ranks[rank].due()
    assert stops == [Stop("interrupted", "a test")] * 2
    assert boundaries[0] == boundaries[1] == expected[0] + 1


def test_the_lead_is_what_steps_and_saves_took() -> None:
    stopping = Stopping(dist.HashStore(), 0, 1, time.time() + 1000)
    assert stopping.lead == pytest.approx(150, rel=0.01)  # nothing is measured yet: a tenth of what is left
    stopping.saved(8.0)
    assert stopping.due() is None
    assert 12.0 <= stopping.lead < 20.0
    near = Stopping(dist.HashStore(), 0, 1, time.time() + 10)
    near.saved(8.0)
    stop = near.due()
    assert stop is not None
    assert stop.kind == "interrupted"


def test_the_start_of_a_job_is_no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long the ranks took to start and to begin: four times that is not what the next steps will take."""
    clock = [1000.0]
    monkeypatch.setattr("neox_core.train.ends.stopping.time.time", lambda: clock[0])
    stopping = Stopping(dist.HashStore(), 0, 1, 1300.0)
    for seconds in (80.0, 5.0, 5.0):
        clock[0] += seconds
        assert stopping.due() is None
    assert stopping.lead == pytest.approx(2 * 5.0 + 1.5 * 30.0)


def test_no_validation_begins_that_the_time_limit_would_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """One every 100 steps of a second takes half a minute. What came after the last save was lost."""
    clock = [1000.0]
    monkeypatch.setattr("neox_core.train.ends.stopping.time.time", lambda: clock[0])
    after_third = 1000.0 + 300 + 3 * 30
    stopping = Stopping(dist.HashStore(), 0, 1, after_third + 120.0)
    stopping.saved(1.0)
    step, stop = 0, None
    while stop is None:
        step += 1
        clock[0] += 31.0 if step % 100 == 0 else 1.0
        stop = stopping.due()
    assert 300 < step < 400, "the fourth validation would be over after the end"
    assert after_third < clock[0] < after_third + 120


def test_a_signal_is_heard_while_the_block_lasts() -> None:
    assert threading.current_thread() is threading.main_thread()
    stopping = Stopping(dist.HashStore(), 0, 1, None)
    before = signal.getsignal(signal.SIGUSR2)
    with stopping.signals():
        signal.raise_signal(signal.SIGUSR2)
        assert stopping.due() == Stop("interrupted", "rank 0 received SIGUSR2")
    assert signal.getsignal(signal.SIGUSR2) is before


def test_the_scheduler_says_when_the_job_ends() -> None:
    assert end_time({"SLURM_JOB_END_TIME": "1700000000"}) == 1700000000.0
    assert end_time({LOCAL_END_TIME: "1700000000.5"}) == 1700000000.5
    assert end_time({"SLURM_JOB_END_TIME": "Unknown"}) is None
    assert end_time({}) is None


def superseded_jobs(config: RunConfig, whole: TrainJob, job: TrainJob, ports: list[int]) -> list[Any]:
    """An undisturbed job; one in whose midst another job of its training comes; and one to the end."""
    from neox_core.checkpoint.lease import Lease
    from neox_core.parallel.ranks.shared_store import shared_store

    found = [train_job(config, whole, None, ports[0])]

    def other_comes() -> None:
        if os.environ["RANK"] == "0":
            channel = shared_store("stopping")
            wait_for(lambda: list_checkpoints(ObjectStore(config.storage), job.prefix))
            Lease(config.storage, job.prefix, lambda _: None)
            wait_for(lambda: channel.check(["request"]))

    with after_step(INTERVAL + 1, other_comes):
        found.append(train_job(config, job, None, ports[1]))
    found.append(train_job(config, job, None, ports[2]))
    return found


def test_a_job_stops_when_another_one_of_its_training_comes(
    storage_config: StorageConfig, store: ObjectStore, tmp_path: Path
) -> None:
    run = small_config(storage_config)
    whole = prepare(run, tmp_path)
    job = replace(whole, fingerprint="b" * 64, output=tmp_path / "superseded")
    for _, (message, begun), (started, again) in run_ranks(superseded_jobs, 2, run, whole, job, rendezvous_ports(3)):
        assert "is written by another job of this training now, number 2" in message
        assert "this one, number 1, stops" in message
        assert "\n" not in message
        assert INTERVAL + 1 <= begun[-1] < STEPS
        # What it had done since its last save is done again, by the job that came then.
        assert (started, again) == (INTERVAL, list(range(INTERVAL + 1, STEPS + 1)))
    names = [manifest.name for manifest in list_checkpoints(store, job.prefix)]
    assert names == [f"global_step{INTERVAL}-1", f"global_step{STEPS}-3"]
    values = [{step: row["train/loss"] for step, row in rows(job).items()} for job in (whole, job)]
    assert values[0] == values[1]


def killed_in_upload(config: RunConfig, job: TrainJob, port: int) -> None:
    """Every rank dies when one of its files of the first checkpoint is in the store, and the others are not."""
    whole, sent = ObjectStore.put_file, []

    def put_file(self: ObjectStore, path: Path, key: str, on_bytes: Any = None) -> None:
        if sent:
            os._exit(9)
        sent.append(key)
        whole(self, path, key, on_bytes)

    wait_to_die = after_step(INTERVAL + 1, lambda: time.sleep(PATIENCE_SECONDS))
    with patch.object(ObjectStore, "put_file", put_file), wait_to_die:
        train_job(config, job, None, port)


def test_a_job_that_dies_in_an_upload_loses_no_save(
    storage_config: StorageConfig, store: ObjectStore, tmp_path: Path
) -> None:
    run = small_config(storage_config)
    job = prepare(run, tmp_path)
    assert killed_ranks(killed_in_upload, 2, run, job, rendezvous_ports(1)[0]) == [9, 9]
    left = {info.key.removeprefix(f"{job.prefix}/").split("/")[0] for info in store.list(f"{job.prefix}/")}
    assert left == {"lease.json", "metrics.jsonl", f"global_step{INTERVAL}-1"}
    assert list_checkpoints(store, job.prefix) == []
    for found in run_ranks(train_job, 2, run, job, None, rendezvous_ports(1)[0]):
        assert found == (INTERVAL, list(range(INTERVAL + 1, STEPS + 1)))
    names = [manifest.name for manifest in list_checkpoints(store, job.prefix)]
    assert names == [f"global_step{INTERVAL}-2", f"global_step{STEPS}-2"]
    left = {info.key.removeprefix(f"{job.prefix}/").split("/")[0] for info in store.list(f"{job.prefix}/")}
    assert left - set(names) == {"lease.json", "metrics.jsonl"}
