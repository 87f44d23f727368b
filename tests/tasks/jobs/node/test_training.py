"""A training of which a rank dies or hangs goes on in the same job, with the numbers of one that nobody disturbed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from neox_core.checkpoint.lease import LEASE_FILE
from neox_core.checkpoint.manifest import list_checkpoints
from neox_core.config import RunConfig, StorageConfig
from neox_core.storage.object_store import ObjectStore
from neox_core.train.ends.saving import SAVED_FILE
from neox_core.train.job import TrainJob
from tests.neox_core.train.ends.test_stopping import STEPS, prepare, small_config
from tests.neox_core.train.small_jobs import rows
from tests.soak.kills import Kill, KillList
from tests.soak.training import run_job


def trained(run: RunConfig, job: TrainJob, folder: Path, *kills: Kill) -> tuple[list[float], str]:
    """The losses of a training with these kills, which all happen, and the first node's controller's log."""
    disturbances = KillList(folder / "kills")
    disturbances.write(list(kills))
    codes, processes = run_job(run, folder / "job", (run, job, folder / "kills"), job.output / SAVED_FILE)
    assert codes == [0] * run.launch.nodes, "\n".join(path.read_text() for path in (folder / "job").glob("*.out"))
    assert disturbances.done() == list(kills)
    assert not any(process.is_alive() for process in processes)
    assert sorted(rows(job)) == list(range(1, STEPS + 1))
    return [row["train/loss"] for row in rows(job).values()], (folder / "job" / "controller-0.log").read_text()


def test_a_killed_and_a_hung_rank(storage_config: StorageConfig, store: ObjectStore, tmp_path: Path) -> None:
    run = small_config(storage_config)
    run = run.model_copy(update={"launch": run.launch.model_copy(update={"hang_timeout_minutes": 0.1})})
    whole = prepare(run, tmp_path)
    disturbed = replace(whole, fingerprint="b" * 64, output=tmp_path / "disturbed")
    expected, _ = trained(run, whole, tmp_path / "1")
    # A rank dies in its 6th step, and its next life hangs in the 3rd. The other rank could hang before it is ended too.
    losses, log = trained(run, disturbed, tmp_path / "2", Kill("rank", "step", 1, 6), Kill("hang", "step", 1, 3))
    assert losses == expected
    assert "rank 1 was killed by signal 9" in log
    assert "rank 0 ended with exit code 75" in log
    assert "because of rank 1 (launch.hang_timeout_minutes)" in log
    # Each life is a holder of its own.
    assert '"number": 3' in (store.get_text(f"{disturbed.prefix}/{LEASE_FILE}") or "")
    assert list_checkpoints(store, disturbed.prefix)[-1].name == f"global_step{STEPS}-3"


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_of_two_nodes(storage_config: StorageConfig, tmp_path: Path, rank: int) -> None:
    run = small_config(storage_config)
    launch = run.launch.model_copy(update={"nodes": 2, "ranks_per_node": 1, "scratch": tmp_path / "scratch"})
    whole = prepare(run, tmp_path)
    disturbed = replace(whole, fingerprint="b" * 64, output=tmp_path / "disturbed")
    expected, _ = trained(run, whole, tmp_path / "1")
    run = run.model_copy(update={"launch": launch})
    losses, log = trained(run, disturbed, tmp_path / "2", Kill("rank", "step", rank, 6))
    assert losses == expected
    assert "starting all ranks again (1 of 3 times without a new checkpoint)" in log
