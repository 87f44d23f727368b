"""One rank's training job, from the process group to the summary."""

from __future__ import annotations

import contextlib
import gc
import logging
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from neox_core.checkpoint.formats.neox import NeoxCheckpoint
from neox_core.checkpoint.lease import JobLease, SupersededError, leased
from neox_core.checkpoint.retention import apply_retention, remove_remains
from neox_core.checkpoint.writer import CheckpointWriter
from neox_core.config import BatchGeometry, RunConfig, batch_geometry, largest_batch
from neox_core.data.dataset import open_validation_data
from neox_core.errors import ConfigError, TrainingError
from neox_core.parallel.precision import parameter_dtype
from neox_core.parallel.ranks.mesh import Mesh, build_mesh, init_distributed
from neox_core.parallel.ranks.shared_store import shared_store
from neox_core.storage.patient_store import PatientStore
from neox_core.train.dry_run import dry_run, memory_explained, zero_weights
from neox_core.train.ends.ending import ended, last_upload
from neox_core.train.ends.saving import Saving
from neox_core.train.ends.stopping import StopAtBoundary, Stopping, end_time
from neox_core.train.engine.deepspeed_engine import build_engine
from neox_core.train.engine.step_engine import StepEngine
from neox_core.train.guards import Guard
from neox_core.train.job import TrainJob, local_checkpoints
from neox_core.train.loop import Loop
from neox_core.train.observe.hardware import peak_flops
from neox_core.train.observe.incidents import IncidentLog
from neox_core.train.observe.metrics import MetricsLog
from neox_core.train.observe.profiler import StepProfiler
from neox_core.train.observe.telemetry import Telemetry
from neox_core.train.observe.watchdog import Watchdog
from neox_core.train.resuming.train_checkpoints import TrainCheckpoints, TrainingState
from neox_core.train.startup import check_ranks_agree, startup_facts

_SUPERSEDED_SECONDS = 40.0
"""For a job that learns, at a renewal of its lease, that another one is at work, to come to a step's boundary."""


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
            engine.close()
        peak = torch.tensor(float(torch.cuda.max_memory_allocated()), device=device)
        dist.all_reduce(peak, op=dist.ReduceOp.MAX)
        return {"dry_run": "passed", "peak_memory_gib": round(float(peak) / 2**30, 2)}


@contextlib.contextmanager
def _world(config: RunConfig) -> Iterator[tuple[torch.device, Watchdog]]:
    """The process group, this rank's device, and the watchdog of the job."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    device = init_distributed(config.launch, config.storage.patience_minutes)
    with Watchdog(60 * config.launch.hang_timeout_minutes, dist.get_rank(), dist.get_world_size()) as watchdog:
        yield device, watchdog
    dist.destroy_process_group()


def _train(config: RunConfig, job: TrainJob, device: torch.device, watchdog: Watchdog) -> dict[str, Any]:
    mesh = build_mesh(config.parallel, device)
    geometry = _geometry(config, mesh)
    engine = _engine(config, job, mesh, geometry, watchdog)
    store = PatientStore(config.storage, watchdog.beat)
    stopping = Stopping(shared_store("stopping"), mesh.rank, mesh.world_size, end_time())
    retain = partial(apply_retention, store, job.prefix, config)
    saving = Saving(stopping, job.output, mesh.rank, retain)

    def superseded(error: SupersededError) -> None:
        watchdog.end_soon(_SUPERSEDED_SECONDS, str(error))
        saving.superseded(error)

    with _ending(store), leased(config.storage, job.prefix, mesh.rank, superseded) as lease:
        writer = _writer(job, mesh, store, saving, lease, watchdog)
        watchdog.beat("resuming")
        if mesh.rank == 0:  # the others wait in what follows, and have nothing under way
            remove_remains(store, job.prefix)
        checkpoints = TrainCheckpoints(
            config, job, store, mesh, engine, writer, watchdog.beat, lease.number, lease.check
        )
        with memory_explained(config, geometry, mesh):
            start = checkpoints.resume()
        gc.collect()
        gc.freeze()  # later collections look at what steps make alone: a pause of one rank is a pause of all
        _steps(config, job, geometry, engine, start, Services(store, checkpoints, stopping, saving, watchdog))
    engine.close()
    if config.launch.scratch and mesh.local_rank == 0:
        shutil.rmtree(local_checkpoints(config, job.output), ignore_errors=True)  # the store has them
    return {"started_from_step": start.step, "prefix": store.url(job.prefix)}


@dataclass(frozen=True)
class Services:
    """What a training uses in addition to its engine."""

    store: PatientStore
    checkpoints: TrainCheckpoints
    stopping: Stopping
    saving: Saving
    watchdog: Watchdog


def _steps(
    config: RunConfig, job: TrainJob, geometry: BatchGeometry, engine: StepEngine, start: TrainingState, use: Services
) -> None:
    """All steps that are left, up to the last upload."""
    mesh, writer = use.checkpoints.mesh, use.checkpoints.writer
    with (
        MetricsLog(config, job.output, use.store, job.prefix, job.fingerprint, mesh.rank) as metrics,
        Telemetry(
            config,
            mesh,
            geometry,
            engine,
            start.data.mixture,
            metrics,
            StepProfiler(config.train.profile, job.output, mesh.rank),
            peak_flops(mesh.device, parameter_dtype(config)) * mesh.world_size,
        ) as telemetry,
    ):
        incidents = IncidentLog(
            job.output, use.store, job.prefix, metrics, engine.gradient_groups, mesh, writer.copy_in_background
        )

        def save(state: TrainingState, upload: bool) -> None:
            use.saving.begin(state.step)
            telemetry.flush()
            if upload:
                writer.copy_in_background("metrics", metrics.backup())
            use.checkpoints.save(state, upload)

        loop = Loop(
            engine=engine,
            train=config.train,
            geometry=partial(batch_geometry, config, None),
            data_rank=mesh.data_rank,
            validation_data=open_validation_data(job.data, config),
            metrics=metrics,
            guard=Guard(config.train.guard, engine.set_loss_limit, incidents.record),
            save=save,
            stop_due=use.stopping.due,
            go_back=use.checkpoints.go_back,
            telemetry=telemetry,
            heartbeat=use.watchdog.beat,
        )
        with use.stopping.signals():  # up to the end: one that comes later must not disturb the last upload
            try:
                with memory_explained(config, geometry, mesh):
                    loop.run(start)
            except TrainingError:  # all ranks stop; the checkpoint on its way is the one to resume from
                last_upload(writer, use.watchdog)
                raise
            except StopAtBoundary as stopped:
                raise ended(stopped, job, use.store, writer, use.watchdog) from None
            last_upload(writer, use.watchdog)
        if mesh.rank == 0:
            remove_remains(use.store, job.prefix)  # of this training's jobs that were killed


def _writer(
    job: TrainJob, mesh: Mesh, store: PatientStore, saving: Saving, lease: JobLease, watchdog: Watchdog
) -> CheckpointWriter:
    writer = CheckpointWriter(
        store,
        job.prefix,
        mesh.rank,
        mesh.world_size,
        shared_store("checkpoints"),
        watchdog.beat,
        store.stopped,
        lease.check,
        saving.published,
        saving.failed,
        saving.written,
        saving.on_disk,
    )
    store.on_behind = partial(saving.behind, writer.reports)
    return writer


@contextlib.contextmanager
def _ending(store: PatientStore) -> Iterator[None]:
    """Afterwards, however it ends, no thread waits for the store any more."""
    try:
        yield
    finally:
        store.stopped.set()


def _engine(config: RunConfig, job: TrainJob, mesh: Mesh, geometry: BatchGeometry, watchdog: Watchdog) -> StepEngine:
    """The engine with the weights to start from, tried out before they are read."""
    weights = NeoxCheckpoint(job.weights).layer_of(config.model, mesh.tensor_size)
    watchdog.beat("building the model")
    with memory_explained(config, geometry, mesh):
        if not config.train.dry_run:
            return build_engine(config, mesh, geometry, weights)
        engine = build_engine(config, mesh, geometry, zero_weights(config))
        watchdog.beat("dry run")
        dry_run(engine, config, geometry, mesh)
    watchdog.beat("weights")
    engine.load_weights(weights)
    return engine


def _geometry(config: RunConfig, mesh: Mesh) -> BatchGeometry:
    """What the engine must have room for."""
    if mesh.world_size != config.launch.world_size:
        raise ConfigError(
            f"this job has {mesh.world_size} ranks, but launch.nodes {config.launch.nodes} x launch.ranks_per_node "
            f"{config.launch.ranks_per_node} = {config.launch.world_size}: make them agree"
        )
    return largest_batch(config)  # the loop sets each step's own
