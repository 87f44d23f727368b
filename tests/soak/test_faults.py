"""Each fault of the store, for a minute in the midst of a training and for another at its resume: it goes on.

SOAK_FAULT_SECONDS changes the minute.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from neox_core.config import StorageConfig
from neox_core.storage.object_store import ObjectStore
from neox_core.train.observe.metrics import METRICS_FILE
from tasks.jobs.rank_record import read_result
from tests.faulty_s3 import FAULTS, FaultyS3, faulty_s3
from tests.neox_core.train.small_jobs import rows
from tests.soak.kills import KillList
from tests.soak.test_soak import check_left, config, prepare, undisturbed
from tests.soak.training import run_to_end

pytestmark = [pytest.mark.soak, pytest.mark.timeout(0)]

STEPS = 8
SECONDS = float(os.environ.get("SOAK_FAULT_SECONDS", "60"))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_minute_of_a_fault(fault: str, storage_config: StorageConfig, store: ObjectStore, tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    run = config(storage_config, "fp32", (1, 1, 1), scratch, STEPS)
    job = prepare(run, tmp_path)
    whole = undisturbed(run, tmp_path)
    kills = KillList(tmp_path / "kills")
    kills.write([])
    metrics = job.output / METRICS_FILE
    with faulty_s3(str(storage_config.endpoint_url)) as proxy:
        behind = run.model_copy(update={"storage": storage_config.model_copy(update={"endpoint_url": proxy.url})})
        with failing(proxy, fault, lambda: metrics.exists() and '"step": 1,' in metrics.read_text()):
            first = run_to_end([behind], job, tmp_path, kills)
        with failing(proxy, fault, lambda: True):  # nothing is left here, so that all comes from the store
            second = run_to_end([behind], job, tmp_path / "resumed", kills)
    assert (first.jobs, second.jobs) == ([0], [0])
    assert read_result(tmp_path / "resumed" / "job-0", 0, 0)["started_from_step"] == STEPS
    assert [row["train/loss"] for row in rows(job).values()] == [row["train/loss"] for row in rows(whole).values()]
    check_left(store, job, second, scratch, tmp_path, STEPS)


@contextmanager
def failing(proxy: FaultyS3, fault: str, begins: Callable[[], bool]) -> Iterator[None]:
    """From a condition on, for a while; the block must last longer, and its requests must meet the fault."""
    met = []

    def fail() -> None:
        while not begins():
            time.sleep(0.02)
        while proxy.failed.acquire(blocking=False):
            pass
        proxy.fail(fault)
        time.sleep(SECONDS)
        # What is refused cannot be seen.
        met.append(fault == "refused" or proxy.failed.acquire(blocking=False))
        proxy.heal()

    thread = threading.Thread(target=fail, daemon=True)
    thread.start()
    yield
    assert met == [True], "it was over before the fault was"
