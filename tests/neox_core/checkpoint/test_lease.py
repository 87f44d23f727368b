"""Who may write: on a store whose conditional PUT is atomic (Ceph), and on one that has none (the embedded one)."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import torch
import torch.distributed as dist

from neox_core.checkpoint.lease import Lease, SupersededError
from neox_core.checkpoint.manifest import Manifest, list_checkpoints
from neox_core.checkpoint.writer import CheckpointWriter
from neox_core.config import StorageConfig
from neox_core.errors import StorageError
from neox_core.storage.conditional_store import ConditionalStore
from neox_core.storage.object_store import ObjectStore
from tests.waiting import wait_for

PREFIX = "train-0123"
PATIENCE = 300.0
"""Seconds after which something hangs."""
RENEWAL = 0.2


@pytest.fixture(params=["embedded", pytest.param("ceph", marks=pytest.mark.ceph)])
def storage(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> StorageConfig:
    """A fresh bucket."""
    endpoint = request.getfixturevalue("s3_endpoint" if request.param == "embedded" else "ceph_endpoint")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", endpoint.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", endpoint.secret_key)
    config = StorageConfig(url=f"s3://test-{uuid4().hex}/some/prefix", endpoint_url=endpoint.url)
    ObjectStore(config).check(create_bucket=True)
    return config


class Jobs:
    """Takes leases, and ends their threads after the test."""

    def __init__(self, storage: StorageConfig, stack: ExitStack) -> None:
        self.storage, self._stack = storage, stack
        self.lost: dict[int, SupersededError] = {}
        self.changed = threading.Event()

    def start(self, renewal: float = RENEWAL) -> Lease:
        """A job comes."""

        def on_lost(error: SupersededError) -> None:
            self.lost[lease.number] = error
            self.changed.set()

        lease = Lease(self.storage, PREFIX, on_lost, renewal)
        return self._stack.enter_context(lease)


@pytest.fixture
def jobs(storage: StorageConfig) -> Iterator[Jobs]:
    with ExitStack() as stack:
        yield Jobs(storage, stack)


def test_the_later_job_has_it_and_the_earlier_one_hears_of_it(jobs: Jobs, caplog: pytest.LogCaptureFixture) -> None:
    first = jobs.start()
    first.check()
    second = jobs.start()
    assert (first.number, second.number) == (1, 2)
    assert jobs.changed.wait(PATIENCE)
    message = str(jobs.lost[1])
    assert f"{jobs.storage.url}/{PREFIX} is written by another job of this training now, number 2 (host " in message
    assert "\n" not in message
    with pytest.raises(SupersededError, match="this one, number 1, stops"):
        first.check()
    second.check()
    assert list(jobs.lost) == [1]
    assert "job number 1 (host" in caplog.text
    assert [info.key for info in ObjectStore(jobs.storage).list()] == [f"{PREFIX}/lease.json"]


def test_renewals_keep_it(jobs: Jobs) -> None:
    if not _is_conditional(jobs.storage):
        pytest.skip("without conditions, renewals only look")
    lease = jobs.start(renewal=0.01)
    versions = set()
    store = ConditionalStore(jobs.storage)

    def seen() -> int:
        found = store.read(f"{PREFIX}/lease.json")
        assert found is not None
        versions.add(found.text)
        return len(versions)

    wait_for(lambda: seen() == 4, PATIENCE)
    lease.check()
    assert not jobs.lost


def test_of_jobs_that_come_at_the_same_moment_one_stays(jobs: Jobs) -> None:
    with ThreadPoolExecutor(6) as pool:
        leases = list(pool.map(lambda _: jobs.start(), range(6)))
    kept = []
    for lease in leases:
        try:
            lease.check()
            kept.append(lease)
        except SupersededError:
            pass
    assert len(kept) == 1
    if _is_conditional(jobs.storage):
        assert sorted(lease.number for lease in leases) == [1, 2, 3, 4, 5, 6]


def _is_conditional(storage: StorageConfig) -> bool:
    return ConditionalStore(storage).is_conditional("probe")


def test_it_is_said_once_where_the_store_has_no_conditional_put(
    jobs: Jobs, request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture
) -> None:
    jobs.start()
    expected = int("embedded" in request.node.name)
    assert caplog.text.count("has no atomic conditional PUT") == expected
    assert _is_conditional(jobs.storage) == (not expected)


def test_a_lost_answer_is_no_other_job(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    """The request was done, and is made again."""
    through, lost = ConditionalStore._put, []
    expected = 2 if _is_conditional(jobs.storage) else 1  # taken, and renewed

    def put(self: ConditionalStore, key: str, text: str, condition: Any) -> str | None:
        answer = through(self, key, text, condition)
        if key.endswith("lease.json") and answer and len(lost) < expected:
            lost.append(key)
            raise StorageError("no answer") from ConnectionError()
        return answer

    monkeypatch.setattr(ConditionalStore, "_put", put)
    lease = jobs.start(renewal=0.05)
    wait_for(lambda: len(lost) == expected, PATIENCE)
    lease.check()
    assert (lease.number, jobs.lost) == (1, {})


def test_without_its_object_numbers_go_on_after_those_of_the_keys(jobs: Jobs) -> None:
    store = ObjectStore(jobs.storage)
    for key in ("global_step5-3/a.pt", "global_step9/a.pt", "lease.json"):
        store.put_text(f"{PREFIX}/{key}", "damaged")
    assert jobs.start(renewal=PATIENCE).number == 4
    store.delete([f"{PREFIX}/lease.json"])
    assert jobs.start().number == 4


def test_two_jobs_do_not_mix(jobs: Jobs, tmp_path: Path) -> None:
    """Both save the same step; the earlier one begins before the later one comes, and ends after it."""
    store = ObjectStore(jobs.storage)
    failures: list[Exception] = []
    writers = []
    for value in (1.0, 2.0):
        lease = jobs.start(renewal=PATIENCE)
        writer = CheckpointWriter(
            store, PREFIX, 0, 1, dist.HashStore(), may_publish=lease.check, failed=failures.append
        )
        writers.append((writer, lease, value))
    for writer, lease, value in reversed(writers):
        manifest = Manifest(7, 56, (), {"tensor": 1}, "0123", {}, attempt=lease.number)
        path = tmp_path / manifest.name / "state.pt"
        writer.save(manifest, lambda take, p=path, v=value: take({"w": torch.full((3,), v)}, p), path.parent)  # type: ignore[misc]
    with pytest.raises(SupersededError):
        writers[0][0].close()
    writers[1][0].close()
    assert [type(error) for error in failures] == [SupersededError]
    (found,) = list_checkpoints(store, PREFIX)
    assert found.name == "global_step7-2"
    store.get_file(f"{PREFIX}/{found.name}/state.pt", tmp_path / "fetched.pt")
    assert torch.load(tmp_path / "fetched.pt", weights_only=True)["w"].tolist() == [2.0, 2.0, 2.0]
