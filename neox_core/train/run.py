"""One rank's training job, from the process group to the summary."""

from __future__ import annotations

import contextlib
import logging
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from neox_core.artifact import software
from neox_core.checkpoint.manifest import (
    Manifest,
    checkpoint_key,
    download_checkpoint,
    training_prefix,
)
from neox_core.checkpoint.neox import NeoxCheckpoint
from neox_core.checkpoint.store import ObjectStore
from neox_core.checkpoint.writer import CheckpointWriter, make_save
from neox_core.config import BatchGeometry, RunConfig, batch_geometry
from neox_core.data.dataset import MixtureDataset, open_training_data, open_validation_data
from neox_core.errors import CheckpointError, ConfigError
from neox_core.parallel.mesh import Mesh, build_mesh, init_distributed
from neox_core.parallel.shared_store import shared_store
from neox_core.parallel.stages import pipeline_layers
from neox_core.train.dry_run import dry_run, load_weights, memory_explained, zero_weights
from neox_core.train.engine import build_engine, parameter_dtype
from neox_core.train.hardware import peak_flops
from neox_core.train.lineage import Ancestor, check_consumed, inherit_metrics, newest_checkpoint
from neox_core.train.loop import Loop
from neox_core.train.metrics import MetricsLog
from neox_core.train.profiler import StepProfiler
from neox_core.train.startup import check_ranks_agree, startup_facts
from neox_core.train.telemetry import Telemetry
from neox_core.train.verification import verify_master_weights
from neox_core.train.watchdog import Watchdog

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainJob:
    """What one training job reads and writes."""

    data: Path
    """Folder of token datasets, as prepare-data makes it."""
    weights: Path
    """Folder of NeoX shards, as convert makes it."""
    output: Path
    """Folder for metrics and local checkpoint files."""
    fingerprint: str
    """Identity of the training; checkpoints of another one are never resumed, but for its ancestors."""
    ancestors: tuple[Ancestor, ...] = ()
    """The trainings that it was before changes of weights."""

    @property
    def prefix(self) -> str:
        """Key of this training's checkpoints in the store."""
        return training_prefix(self.fingerprint)


def train(config: RunConfig, job: TrainJob) -> dict[str, Any]:
    """Train on this rank, resuming from the newest complete checkpoint in the store. Collective over all ranks.

    Returns:
        The step that training started from, and where the checkpoints are.

    Raises:
        ConfigError, DataError, CheckpointError, StorageError, LaunchError, TrainingError: see the message.
    """
    with _world(config) as (device, watchdog):
        watchdog.beat("check of the ranks")
        check_ranks_agree(startup_facts(config, job.fingerprint, job.data, job.weights))
        return _train(config, job, device, watchdog)


def rehearse(config: RunConfig) -> dict[str, Any]:
    """Find out whether a step of the run works and fits, without its data and weights. Collective over all ranks.

    Returns:
        GiB of device memory at the peak, on the fullest rank; 0 on CPUs.

    Raises:
        ConfigError, LaunchError: see the message.
    """
    with _world(config) as (device, _):
        mesh = build_mesh(config.parallel, device)
        geometry = _geometry(config, mesh)
        with memory_explained(config, geometry, mesh):
            engine = build_engine(config, mesh, geometry, zero_weights(config))
            dry_run(engine, config, geometry, mesh)
        peak = torch.tensor(float(torch.cuda.max_memory_allocated()), device=device)
        dist.all_reduce(peak, op=dist.ReduceOp.MAX)
        return {"dry_run": "passed", "peak_memory_gib": round(float(peak) / 2**30, 2)}


@contextlib.contextmanager
def _world(config: RunConfig) -> Iterator[tuple[torch.device, Watchdog]]:
    """The process group, this rank's device, and the watchdog of the job."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    device = init_distributed(config.launch)
    with Watchdog(60 * config.launch.hang_timeout_minutes, dist.get_rank(), dist.get_world_size()) as watchdog:
        yield device, watchdog
    dist.destroy_process_group()


def _train(config: RunConfig, job: TrainJob, device: torch.device, watchdog: Watchdog) -> dict[str, Any]:
    mesh = build_mesh(config.parallel, device)
    geometry = _geometry(config, mesh)
    engine = _engine(config, job, mesh, geometry, watchdog)
    store = ObjectStore(config.storage)
    data = open_training_data(job.data, config)
    channel = shared_store("checkpoints")
    writer = CheckpointWriter(
        store, job.prefix, mesh.rank, mesh.world_size, _shared_attempt_id(), channel, watchdog.alive
    )
    engine.checkpoint_engine = writer
    watchdog.beat("resuming")
    start = _resume(config, engine, store, job, mesh, data)
    save_state = make_save(engine, writer, job.output / "checkpoints")

    with (
        MetricsLog(config, job.output, store, job.prefix, job.fingerprint, mesh.rank) as metrics,
        Telemetry(
            config,
            mesh,
            geometry,
            engine,
            data.mixture,
            metrics,
            StepProfiler(config.train.profile, job.output, mesh.rank),
            peak_flops(device, parameter_dtype(config)) * mesh.world_size,
        ) as telemetry,
    ):

        def heartbeat(place: str) -> None:
            writer.check()
            watchdog.beat(place)

        def save(step: int) -> None:
            telemetry.flush()
            metrics.backup()
            save_state(_manifest(config, job, mesh, step, step * geometry.sequences, data.consumed))

        loop = Loop(
            engine=engine,
            train=config.train,
            geometry=geometry,
            data_rank=mesh.data_rank,
            training_data=data,
            validation_data=open_validation_data(job.data, config),
            metrics=metrics,
            save=save,
            telemetry=telemetry,
            heartbeat=heartbeat,
        )
        with memory_explained(config, geometry, mesh):
            loop.run(start)
    watchdog.beat("last upload")
    writer.close()
    # Rank 0 publishes the last manifest: nobody leaves before it.
    dist.barrier()
    return {"started_from_step": start, "prefix": store.url(job.prefix)}


def _engine(config: RunConfig, job: TrainJob, mesh: Mesh, geometry: BatchGeometry, watchdog: Watchdog) -> Any:
    """The engine with the weights to start from, tried out before they are read."""
    weights = NeoxCheckpoint(job.weights).layer
    watchdog.beat("building the model")
    with memory_explained(config, geometry, mesh):
        if not config.train.dry_run:
            return build_engine(config, mesh, geometry, weights)
        engine = build_engine(config, mesh, geometry, zero_weights(config))
        watchdog.beat("dry run")
        dry_run(engine, config, geometry, mesh)
    watchdog.beat("weights")
    load_weights(engine, weights, mesh)
    return engine


def _geometry(config: RunConfig, mesh: Mesh) -> BatchGeometry:
    if mesh.world_size != config.launch.world_size:
        raise ConfigError(
            f"this job has {mesh.world_size} ranks, but launch.nodes {config.launch.nodes} x launch.ranks_per_node "
            f"{config.launch.ranks_per_node} = {config.launch.world_size}: make them agree"
        )
    return batch_geometry(config)


def _shared_attempt_id() -> str:
    ids = [uuid.uuid4().hex]
    dist.broadcast_object_list(ids, src=0)
    return ids[0]


def _layout(config: RunConfig, mesh: Mesh) -> dict[str, Any]:
    """What the optimizer's files depend on: the ranks, and the layers of each stage if there are several."""
    if mesh.pipeline_size == 1:
        return mesh.layout
    return mesh.layout | {"pipeline_layers": list(pipeline_layers(config))}


def _resume(config: RunConfig, engine: Any, store: ObjectStore, job: TrainJob, mesh: Mesh, data: MixtureDataset) -> int:
    """Load the newest complete checkpoint, if there is one, and return its step."""
    found = _newest_checkpoint(store, job)
    if found is None:
        return 0
    prefix, manifest = found
    check_consumed(data, manifest)
    if manifest.layout != (layout := _layout(config, mesh)):
        raise CheckpointError(
            f"checkpoint {store.url(prefix)}/{checkpoint_key(manifest.step)} was written with layout "
            f"{manifest.layout}, this job has {layout}: use the same parallel sections and number of nodes"
        )
    own_state = f"zero_pp_rank_{mesh.data_rank}_mp_rank_{_model_rank(mesh):02d}_optim_states.pt"
    folder = job.output / "checkpoints"
    # Weights and metadata once per node, and this rank's own share of the optimizer state.
    if mesh.local_rank == 0:
        download_checkpoint(store, prefix, manifest, folder, lambda name: "optim_states" not in name)
    download_checkpoint(store, prefix, manifest, folder, lambda name: name.endswith(own_state))
    dist.barrier()
    engine.load_checkpoint(str(folder), tag=checkpoint_key(manifest.step))
    verify_master_weights(engine)
    if prefix != job.prefix and mesh.rank == 0:
        inherit_metrics(store, prefix, manifest.step, job.output)
    logger.info("resumed from step %d, %d sequences consumed", manifest.step, manifest.sequences_consumed)
    return manifest.step


def _model_rank(mesh: Mesh) -> int:
    """DeepSpeed's `mp_rank`: the index among ranks that share a data-parallel rank."""
    return mesh.pipeline_rank * mesh.tensor_size + mesh.tensor_rank


def _newest_checkpoint(store: ObjectStore, job: TrainJob) -> tuple[str, Manifest] | None:
    """Rank 0 decides for all, so that no two ranks resume from different steps."""
    found: list[tuple[str, Manifest] | None] = [None]
    if dist.get_rank() == 0:
        found = [newest_checkpoint(store, job.fingerprint, job.ancestors)]
    dist.broadcast_object_list(found, src=0)
    return found[0]


def _manifest(config: RunConfig, job: TrainJob, mesh: Mesh, step: int, sequences: int, consumed: Any) -> Manifest:
    return Manifest(
        step=step,
        sequences_consumed=sequences,
        files=(),
        layout=_layout(config, mesh),
        fingerprint=job.fingerprint,
        config=config.model_dump(mode="json"),
        consumed=consumed(sequences),
        software=software(),
    )
