"""What a job checks before its first step."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist

from neox_core.artifact import FileRecord
from neox_core.checkpoint.manifest import Manifest, publish_manifest
from neox_core.checkpoint.partitions import Layout, Place
from neox_core.checkpoint.resharding import Resharding
from neox_core.data.skipped import SkippedSequences
from neox_core.errors import CheckpointError, ConfigError, TrainingError
from neox_core.parallel.ranks.mesh import Mesh
from neox_core.storage.object_store import ObjectStore
from neox_core.train import run
from neox_core.train.engine.state.files import is_own_file, is_shared_file
from neox_core.train.job import TrainJob
from neox_core.train.observe.hardware import peak_flops
from neox_core.train.resuming import train_checkpoints as resume
from neox_core.train.resuming.lineage import Ancestor
from neox_core.train.resuming.train_checkpoints import TrainCheckpoints, TrainingState
from tests.neox_core.train.small_training import BATCH, SEQUENCE, config_for

ONE_RANK = Mesh(
    rank=0, local_rank=0, world_size=1, tensor_rank=0, tensor_size=1, pipeline_rank=0,
    pipeline_size=1, data_rank=0, data_size=1, tensor_group=cast(Any, None), device=torch.device("cpu"),
)  # fmt: skip
DATA = cast(Any, SimpleNamespace(consumed=lambda sequences: {}))
"""A mixture whose ledger agrees with any checkpoint's."""
LAYOUT = {"tensor": 1, "pipeline": 1, "data": 1}


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    """A world of this process alone."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "world"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def job(tmp_path: Path) -> TrainJob:
    return TrainJob(tmp_path, tmp_path, tmp_path / "output", "0123456789abcdef" * 4)


TWO_FILES = ("layer_00-model_00-model_states.pt", "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt")


def publish(
    store: ObjectStore, job: TrainJob, step: int, layout: dict[str, Any], names: Sequence[str] = TWO_FILES
) -> None:
    """A complete checkpoint of small files."""
    files = []
    for name in names:
        store.put_text(f"{job.prefix}/global_step{step}/{name}", "x")
        files.append(FileRecord(name, 1, "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"))
    publish_manifest(store, job.prefix, Manifest(step, step * BATCH, tuple(files), layout, job.fingerprint, {}))


class Engine:
    """Records what it has to load. Files are called as the real engine calls them."""

    def __init__(self) -> None:
        self.loaded: list[tuple[str, list[str]]] = []

    def load_state(self, folder: Path, tag: str) -> None:
        self.loaded.append((tag, sorted(path.name for path in (folder / tag).iterdir())))

    def load_resharded(self, folder: Path, tag: str, step: int, resharding: Resharding) -> None:
        self.load_state(folder, f"{tag}")
        self.resharding = resharding

    def shared_file(self, name: str) -> bool:
        return is_shared_file(name)

    def optimizer_file(self, name: str, place: Place, tensor_size: int) -> bool:
        return is_own_file(name, place, tensor_size)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Engine:
    engine = Engine()
    monkeypatch.setattr(resume, "open_training_data", lambda folder, config, skipped=(): DATA)
    return engine


def checkpoints(
    engine: Engine, store: ObjectStore, job: TrainJob, mesh: Mesh = ONE_RANK, layers: int = 2, **parallel: Any
) -> TrainCheckpoints:
    writer, config = cast(Any, SimpleNamespace(wait=lambda: None)), config_for("gqa", 1, 1, 1)
    model = config.model.model_copy(update={"num_layers": layers})
    config = config.model_copy(update={"model": model, "parallel": config.parallel.model_copy(update=parallel)})
    return TrainCheckpoints(config, job, store, mesh, cast(Any, engine), writer)


def test_number_of_ranks_must_be_the_configured_one() -> None:
    config = config_for("gqa", 1, 1, 1)
    geometry = run._geometry(config, ONE_RANK)
    assert (geometry.sequences, geometry.tokens, geometry.accumulation_steps) == (BATCH, BATCH * SEQUENCE, BATCH // 2)
    with pytest.raises(ConfigError, match=r"this job has 4 ranks, but launch.nodes 1 x launch.ranks_per_node 1 = 1"):
        run._geometry(config, replace(ONE_RANK, world_size=4))


def test_nothing_to_resume(one_rank: None, engine: Engine, store: ObjectStore, job: TrainJob) -> None:
    assert checkpoints(engine, store, job).resume() == TrainingState(0, DATA)
    assert engine.loaded == []


def test_the_newest_complete_checkpoint_is_resumed(
    one_rank: None, engine: Engine, store: ObjectStore, job: TrainJob
) -> None:
    for step in (9, 10):
        publish(store, job, step, LAYOUT)
    store.put_text(f"{job.prefix}/global_step11/layer_00-model_00-model_states.pt", "x")  # not complete
    publish(store, replace(job, fingerprint="f" * 64), 12, LAYOUT)  # of another training
    assert checkpoints(engine, store, job).resume() == TrainingState(10, DATA)
    names = ["bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt", "layer_00-model_00-model_states.pt"]
    assert engine.loaded == [("global_step10", names)]


def test_where_the_newest_is_damaged_the_one_before_is_taken(
    one_rank: None, engine: Engine, store: ObjectStore, job: TrainJob, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (8, 9, 10):
        publish(store, job, step, LAYOUT)
    weights = "layer_00-model_00-model_states.pt"
    for step in (9, 10):
        store.put_text(f"{job.prefix}/global_step{step}/{weights}", "y")
    assert checkpoints(engine, store, job).resume() == TrainingState(8, DATA)
    assert [tag for tag, _ in engine.loaded] == ["global_step8"]
    errors = [record.message for record in caplog.records if record.levelname == "ERROR"]
    assert [re.search(r"global_step\d+/\S+ is damaged", text) is not None for text in errors] == [True, True]
    store.put_text(f"{job.prefix}/global_step8/{weights}", "y")
    shutil.rmtree(job.output)
    with pytest.raises(CheckpointError, match=r"global_step8/.* is damaged.*nor is there an earlier checkpoint"):
        checkpoints(engine, store, job).resume()


def test_only_own_optimizer_state_is_fetched(one_rank: None, engine: Engine, store: ObjectStore, job: TrainJob) -> None:
    layout = {"tensor": 1, "pipeline": 1, "data": 2}
    publish(store, job, 10, layout)
    second = replace(ONE_RANK, rank=1, local_rank=1, data_rank=1, data_size=2, world_size=2)
    checkpoints(engine, store, job, second).resume()
    assert engine.loaded == [("global_step10", [])]  # rank 0 of the node fetches the weights


def test_another_layout_is_read_from_the_files_that_are_needed(
    one_rank: None, engine: Engine, store: ObjectStore, job: TrainJob
) -> None:
    """Of eight files, the first stage of two on the first of two tensor-parallel ranks needs those of its layers."""
    saved, names = {"tensor": 1, "pipeline": 1, "data": 8}, [f"bf16_{own_file(rank)}" for rank in range(8)]
    publish(store, job, 10, saved, (*names, "layer_00-model_00-model_states.pt"))
    mesh = replace(ONE_RANK, tensor_size=2, pipeline_size=2)
    assert checkpoints(engine, store, job, mesh, tensor=2, pipeline=2).resume() == TrainingState(10, DATA)
    assert engine.resharding.saved == Layout(1, 8, (2,))
    assert engine.resharding.own == Layout(2, 1, (1, 1))
    (loaded,) = engine.loaded
    assert loaded == ("global_step10", names[:4])


def test_other_layers_per_stage_are_another_layout(
    one_rank: None, engine: Engine, store: ObjectStore, job: TrainJob
) -> None:
    """Optimizer states lie in files per stage."""
    two_stages = replace(ONE_RANK, pipeline_size=2)
    names = [own_file(0, stage) for stage in range(2)]
    publish(store, job, 10, two_stages.layout | {"pipeline_layers": [1, 3]}, names)
    resumed = checkpoints(engine, store, job, two_stages, pipeline=2, pipeline_layers=(3, 1), layers=4).resume()
    assert resumed == TrainingState(10, DATA)
    assert engine.resharding.saved.stages == (1, 3)
    assert engine.loaded == [("global_step10", names)]


def test_what_is_on_local_disk_alone_is_read_in_another_layout(
    one_rank: None, engine: Engine, store: ObjectStore, job: TrainJob
) -> None:
    """It was not used, and removed: the training went back to what the store had."""
    saved, names = {"tensor": 1, "pipeline": 1, "data": 2}, [f"bf16_{own_file(rank)}" for rank in range(2)]
    for step in (9, 10):
        publish(store, job, step, saved, names)
    downloaded = ("manifest.json", *names)
    for name in downloaded:
        store.get_file(f"{job.prefix}/global_step10/{name}", job.output / "checkpoints" / "global_step10" / name)
    store.delete([f"{job.prefix}/global_step10/{name}" for name in downloaded])
    resuming, uploaded = checkpoints(engine, store, job), list[tuple[int, list[str]]]()

    def upload(manifest: Manifest, folder: Path, records: Sequence[FileRecord]) -> None:
        uploaded.append((manifest.step, [record.path for record in records]))

    resuming.writer.upload = upload  # type: ignore[method-assign,assignment]
    assert resuming.resume() == TrainingState(10, DATA)
    assert engine.resharding.saved == Layout(1, 2, (2,))
    assert uploaded == [(10, names)]


def own_file(data_rank: int, model_rank: int = 0) -> str:
    return f"zero_pp_rank_{data_rank}_mp_rank_{model_rank:02d}_optim_states.pt"


def test_another_batch_before_the_checkpoint_is_refused(
    one_rank: None, engine: Engine, store: ObjectStore, job: TrainJob
) -> None:
    publish_manifest(store, job.prefix, Manifest(10, 10 * BATCH + 1, (), LAYOUT, job.fingerprint, {}))
    with pytest.raises(
        CheckpointError, match=r"had consumed 81 sequences, but this configuration takes 80 up to there"
    ):
        checkpoints(engine, store, job).resume()
    assert engine.loaded == []


def incident(step: int, first: int) -> Any:
    outcome, batch = SimpleNamespace(step=step), SimpleNamespace(first=first, count=BATCH)
    return SimpleNamespace(outcome=outcome, batch=batch, problem="not finite")


def test_going_back(one_rank: None, engine: Engine, store: ObjectStore, job: TrainJob) -> None:
    for step in (9, 10):
        publish(store, job, step, LAYOUT)
    saved = checkpoints(engine, store, job)
    skipped = SkippedSequences(10, 10 * BATCH, 3 * BATCH)
    assert saved.go_back(incident(13, 12 * BATCH)) == TrainingState(10, DATA, (skipped,))
    assert saved.resume() == TrainingState(10, DATA, (skipped,)), "as a job does that is started after a kill"
    again = SkippedSequences(10, 13 * BATCH, BATCH)
    assert saved.go_back(incident(11, 13 * BATCH)) == TrainingState(10, DATA, (skipped, again))
    assert [tag for tag, _ in engine.loaded] == ["global_step10"] * 3
    # What was skipped after step 10 says nothing of another step.
    store.delete([info.key for info in store.list(f"{job.prefix}/global_step10/")])
    assert saved.resume() == TrainingState(9, DATA)


def test_what_was_skipped_after_a_checkpoint_says_nothing_of_the_next_of_its_step(
    one_rank: None, engine: Engine, store: ObjectStore, job: TrainJob
) -> None:
    """The first one was damaged or removed, and training has come there again from one before, on other sequences."""
    for step in (9, 10):
        publish(store, job, step, LAYOUT)
    saved = checkpoints(engine, store, job)
    store.delete([f"{job.prefix}/global_step10/manifest.json"])
    saved.go_back(incident(10, 9 * BATCH))  # after 9, of which nothing is left
    publish_manifest(store, job.prefix, Manifest(10, 11 * BATCH, (), LAYOUT, job.fingerprint, {}, skipped=[
        {"after_step": 9, "first": 9 * BATCH, "count": BATCH}
    ]))  # fmt: skip
    assert len(saved.go_back(incident(11, 11 * BATCH)).skipped) == 2
    assert len(saved.resume().skipped) == 2
    store.delete([f"{job.prefix}/global_step10/manifest.json"])
    publish_manifest(store, job.prefix, Manifest(10, 10 * BATCH, (), LAYOUT, job.fingerprint, {}, attempt=2))
    assert saved.resume() == TrainingState(10, DATA)


def test_what_an_ancestor_skipped_after_its_checkpoint(
    one_rank: None, engine: Engine, store: ObjectStore, job: TrainJob
) -> None:
    """It is left out here too, unless this training has gone back to the checkpoint itself."""
    publish(store, job, 10, LAYOUT)
    checkpoints(engine, store, job).go_back(incident(11, 10 * BATCH))
    branch = replace(job, fingerprint="f" * 64, ancestors=(Ancestor(job.fingerprint, 10),))
    skipped = SkippedSequences(10, 10 * BATCH, BATCH)
    assert checkpoints(engine, store, branch).resume() == TrainingState(10, DATA, (skipped,))
    again = SkippedSequences(10, 11 * BATCH, BATCH)
    assert checkpoints(engine, store, branch).go_back(incident(11, 11 * BATCH)).skipped == (skipped, again)
    assert checkpoints(engine, store, branch).resume().skipped == (skipped, again)
    assert checkpoints(engine, store, job).resume().skipped == (skipped,)


def test_nothing_to_go_back_to(one_rank: None, engine: Engine, store: ObjectStore, job: TrainJob) -> None:
    with pytest.raises(TrainingError, match=r"step 3: not finite, and there is no checkpoint to go back to: lower"):
        checkpoints(engine, store, job).go_back(incident(3, 2 * BATCH))


@pytest.mark.parametrize(
    ("name", "tflops"), [("NVIDIA A100-SXM4-40GB", 312), ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756)]
)
def test_peak_of_known_gpus(name: str, tflops: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(cast(Any, SimpleNamespace(type="cuda")), torch.bfloat16) == tflops * 1e12


def test_peak_of_a_cpu_is_measured() -> None:
    assert 1e8 < peak_flops(torch.device("cpu"), torch.float32) < 1e14
