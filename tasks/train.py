"""train: submit the job or re-attach to it, and follow it to its end."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from neox_core.checkpoint.manifest import Manifest
from neox_core.config import RunConfig
from neox_core.errors import CheckpointError, StorageError
from neox_core.progress import Progress
from neox_core.storage.atomic import write_atomically
from neox_core.storage.full_disk import room_below, write_if_room
from neox_core.train.ends.saving import SAVED_FILE
from neox_core.train.job import local_checkpoints
from neox_core.train.observe.metrics import INCIDENTS_FILE, METRICS_FILE
from neox_core.train.observe.rows import read_metrics, read_rows, training_figures
from neox_core.train.resuming.lineage import Ancestor
from tasks.follow import follow, share_done
from tasks.identity.specs import TRAIN
from tasks.identity.stage import StageResult, how_to_run, require, run_stage
from tasks.identity.training import Training
from tasks.jobs.launch import Job, find_jobs, submit_or_attach
from tasks.jobs.restarts import run_to_end
from tasks.jobs.retry import SchedulerRetry
from tasks.new_training import CONFIG_FILE, say_if_new

logger = logging.getLogger(__name__)

FAILURE_FILE = "failed"
"""Left in the scratch folder by a train stage that failed, for an evaluation that waits for its checkpoints."""
RESTART_FILE = "restart"
"""In the scratch folder: why the job was last submitted again."""
_INCIDENT_KEYS = ("step", "problem", "action", "loss", "gradient_norm", "ranks", "sources")


def train(training: Training, progress: Progress) -> StageResult:
    """Train to the last step, or find it done. A job that is running already is followed, not submitted again; one
    that ends before its time is, as long as that brings new checkpoints (see `launch.max_restarts`).

    The artifact holds metrics.jsonl; the checkpoints lie in the store.

    Raises:
        LaunchError: the job failed; the message is the failing rank's. Or SLURM does not answer for long.
        ConfigError: the workdir's disk is full.
    """
    failure = training.scratch / FAILURE_FILE
    failure.unlink(missing_ok=True)
    try:
        with room_below(training.config.workdir):
            return _train(training, progress)
    except BaseException as error:
        write_if_room(failure, str(error))
        raise


def _train(training: Training, progress: Progress) -> StageResult:
    config, scratch = training.config, training.scratch
    data, weights = require(training.data), require(training.weights)
    say_if_new(training)
    scratch.mkdir(parents=True, exist_ok=True)
    write_atomically(scratch / CONFIG_FILE, config.model_dump_json())

    def submit() -> Job:
        return submit_or_attach(
            config.launch,
            config.workdir / "jobs",
            "train",
            training.fingerprint,
            train_rank,
            (config, data.folder, weights.folder, scratch, training.fingerprint, training.ancestors),
            config.launch.nodes,
            config.launch.ranks_per_node,
            # What an earlier job made may be gone since; a new one finds in the store what is left to do.
            accept_completed=_is_complete(training) and (scratch / METRICS_FILE).is_file(),
            saved=scratch / SAVED_FILE,
        )

    def waiting(why: str) -> None:
        write_if_room(scratch / RESTART_FILE, why)
        progress(share_done(config, scratch / METRICS_FILE), why)

    def build(folder: Path) -> Mapping[str, Any]:
        result = run_to_end(
            lambda: SchedulerRetry().wait_for(
                submit, meanwhile=lambda: progress(0.0, "waiting for SLURM, which does not answer")
            ),
            lambda job: follow(job, config, scratch / METRICS_FILE, progress),
            lambda: _last_saved(training),
            config.launch.max_restarts,
            waiting,
        )[0]
        for path in (scratch / METRICS_FILE, scratch / INCIDENTS_FILE):
            if path.is_file():
                shutil.copyfile(path, folder / path.name)
        shutil.rmtree(local_checkpoints(config, scratch), ignore_errors=True)  # the store has them
        return _summary(training, folder, result)

    return run_stage(training.spec, build, progress, still_valid=lambda _: _is_complete(training))


def train_rank(
    config: RunConfig, data: Path, weights: Path, output: Path, fingerprint: str, lineage: tuple[Ancestor, ...]
) -> dict[str, Any]:
    """What each rank of the job runs.

    Imports torch and DeepSpeed, which the flow does not: its threads would do so at once, and deadlock.
    """
    from neox_core.train.job import TrainJob
    from neox_core.train.run import train as train_on_this_rank

    return train_on_this_rank(config, TrainJob(data, weights, output, fingerprint, lineage))


def training_jobs(training: Training) -> list[Job]:
    """The job of this training, if it was ever submitted."""
    return find_jobs(training.config.workdir / "jobs", training.fingerprint)


def last_manifest(training: Training) -> Manifest:
    """The manifest of the last step's checkpoint.

    Raises:
        CheckpointError: it is not complete.
    """
    manifests = training.checkpoints()
    if not manifests or manifests[-1].step != training.config.train.steps:
        raise CheckpointError(
            f"{training.store.url(training.prefix)} holds no complete checkpoint of step "
            f"{training.config.train.steps}, only of {[manifest.step for manifest in manifests]}: {how_to_run(TRAIN)}"
        )
    return manifests[-1]


def _complete_steps(training: Training) -> list[int]:
    return [manifest.step for manifest in training.checkpoints()]


def _is_complete(training: Training) -> bool:
    return _complete_steps(training)[-1:] == [training.config.train.steps]


def _last_saved(training: Training) -> int:
    """The step of the newest complete checkpoint; 0 if there is none, or the store does not answer."""
    try:
        return max(_complete_steps(training), default=0)
    except StorageError as error:
        logger.warning("whether there is a new checkpoint is not known: %s", error)
        return 0


def _summary(training: Training, folder: Path, result: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **result,
        **training_figures(read_metrics(folder / METRICS_FILE)),
        "checkpoints": _complete_steps(training),
        "consumed": training.consumed_history(),
        "incidents": _incidents(folder / INCIDENTS_FILE),
        "changes": training.config.model_dump(mode="json")["train"]["changes"],
    }


def _incidents(path: Path) -> list[dict[str, Any]]:
    """The records of the steps that were not done, without their long lists."""
    return [{name: record[name] for name in _INCIDENT_KEYS} for record in read_rows(path)]
