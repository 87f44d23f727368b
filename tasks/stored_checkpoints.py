"""A training's checkpoints in the store, looked at and handled by people: `llemma checkpoint`."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from infra.s3.service import storage_service
from neox_core.checkpoint.manifest import (
    MANIFEST_FILE,
    Manifest,
    checkpoint_step,
    download_checkpoint,
    object_key,
)
from neox_core.checkpoint.retention import remove_checkpoint
from neox_core.config import RunConfig
from neox_core.errors import CheckpointError, ConfigError
from neox_core.progress import Progress
from neox_core.storage.atomic import write_atomically
from neox_core.storage.folders import S3Folder
from neox_core.train.job import local_checkpoints
from neox_core.train.resuming.local_copy import newest_local
from tasks.identity.training import Training, resolve_training


@dataclass(frozen=True)
class StoredCheckpoint:
    """What the store, or a local disk, has of a step."""

    step: int
    state: str
    """complete, incomplete, or only on local disk."""
    files: int
    bytes: int
    place: str
    """Key prefix of the training that it is of, or the local folder."""
    manifest: Manifest | None = None


@contextmanager
def opened_training(config: RunConfig) -> Iterator[Training]:
    """The configuration's training, with the store that it names running."""
    with storage_service(config.storage, config.workdir) as storage:
        yield resolve_training(config.model_copy(update={"storage": storage}))


def stored_checkpoints(training: Training) -> list[StoredCheckpoint]:
    """All that there is of the training, by step; those that it shares with a training that it goes on from too."""
    store, found = training.store, []
    lineage = training.lineage_checkpoints()
    for step, (prefix, manifest) in lineage.items():
        size = sum(record.size for record in manifest.files)
        found.append(StoredCheckpoint(step, "complete", len(manifest.files), size, prefix, manifest))
    sizes, files = Counter[int](), Counter[int]()
    for info in store.list(f"{training.prefix}/"):
        incomplete = checkpoint_step(info.key.removeprefix(f"{training.prefix}/").split("/")[0])
        if incomplete is not None and incomplete not in lineage:
            sizes[incomplete] += info.size
            files[incomplete] += 1
    for step, size in sizes.items():
        found.append(StoredCheckpoint(step, "incomplete", files[step], size, training.prefix))
    folder = local_checkpoints(training.config, training.scratch)
    if (local := newest_local(folder, training.fingerprint)) and local.step not in lineage:
        size, place = sum(record.size for record in local.files), str(folder / local.name)
        found.append(StoredCheckpoint(local.step, "only on local disk", len(local.files), size, place, local))
    return sorted(found, key=lambda entry: entry.step)


def chosen(training: Training, step: int | None) -> tuple[str, Manifest]:
    """Key prefix and manifest of a complete checkpoint; of the newest one without a step.

    Raises:
        ConfigError: there is none.
    """
    found = training.lineage_checkpoints()
    if not found:
        raise ConfigError(f"{training.store.url(training.prefix)} holds no complete checkpoint")
    if step is not None and step not in found:
        raise ConfigError(f"there is no complete checkpoint of step {step}: there are those of {list(found)}")
    return found[max(found) if step is None else step]


def verify(training: Training, step: int | None, progress: Progress) -> tuple[int, list[str]]:
    """Read every byte of a checkpoint and compare SHA-256s; its step, and the files that are not what they were."""
    prefix, manifest = chosen(training, step)
    total, done, damaged = sum(record.size for record in manifest.files), 0, []
    folder = S3Folder(training.store)
    for record in manifest.files:
        content = folder.content(object_key(prefix, manifest.name, record.path))

        def read(count: int, path: str = record.path) -> None:
            nonlocal done
            done += count
            progress(done / max(total, 1), path)

        if content.digest(read) != record.sha256:
            damaged.append(record.path)
    return manifest.step, damaged


def fetch(training: Training, step: int | None, folder: Path) -> Path:
    """Bring a checkpoint's files to a folder, verified, with its manifest; what is there already stays. The folder.

    Raises:
        CheckpointError: a file is damaged.
    """
    prefix, manifest = chosen(training, step)
    target = download_checkpoint(training.store, prefix, manifest, folder, lambda _: True)
    write_atomically(target / MANIFEST_FILE, manifest.to_json())
    return target


def remove(training: Training, step: int, force: bool) -> int:
    """Remove a step's checkpoint, complete or not, from the store and from local disk. The bytes in the store.

    Raises:
        CheckpointError: there is none of the training's own; or it is the newest complete one, without `force`.
    """
    complete = [manifest.step for manifest in training.checkpoints()]
    if step == max(complete, default=None) and not force:
        raise CheckpointError(
            f"step {step} is the newest complete checkpoint, from which training would go on: give --force to remove it"
        )
    folders = local_checkpoints(training.config, training.scratch).glob("global_step*")
    local = [folder for folder in folders if checkpoint_step(folder.name) == step]
    removed = remove_checkpoint(training.store, training.prefix, step)
    if not removed and not local:
        raise CheckpointError(f"there is nothing of step {step} in {training.store.url(training.prefix)}")
    for folder in local:
        shutil.rmtree(folder, ignore_errors=True)
    return removed
