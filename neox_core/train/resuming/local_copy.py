"""Checkpoints that are on local disk and did not come to the object store: a job ended, or the store had failed."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch.distributed as dist

from neox_core.artifact import FileRecord
from neox_core.checkpoint.manifest import MANIFEST_FILE, Manifest
from neox_core.errors import CheckpointError
from neox_core.storage.digest import sha256_of

logger = logging.getLogger(__name__)


def newest_local(folder: Path, fingerprint: str) -> Manifest | None:
    """The newest checkpoint of the training below `folder` whose manifest is there: all ranks had written their files.

    A manifest goes when the store has the checkpoint.
    """
    found = []
    for path in folder.glob(f"global_step*/{MANIFEST_FILE}"):
        try:
            manifest = Manifest.from_json(path.read_text(encoding="utf-8"))
        except CheckpointError as error:
            logger.warning("%s ignored: %s", path, error)
            continue
        if manifest.fingerprint == fingerprint and path.parent.name == manifest.name:
            found.append(manifest)
    return max(found, key=lambda manifest: (manifest.step, manifest.attempt), default=None)


def here_on_all_ranks(folder: Path, records: Iterable[FileRecord]) -> bool:
    """Whether every rank has the files that it wants, as they were written. Collective over all ranks.

    Args:
        folder: the checkpoint's.
        records: of the files that this rank wants.
    """
    whole = all(_has(folder, record) and sha256_of(folder / record.path) == record.sha256 for record in records)
    everywhere: list[bool] = [False] * dist.get_world_size()
    dist.all_gather_object(everywhere, whole)
    return all(everywhere)


def upload_shares(folder: Path, manifest: Manifest) -> tuple[FileRecord, ...]:
    """The files that this rank is to upload: each file is some rank's that has it. Collective over all ranks."""
    own = [record.path for record in manifest.files if _has(folder, record)]
    everyones: list[list[str]] = [[]] * dist.get_world_size()
    dist.all_gather_object(everyones, own)
    found = []
    for index, record in enumerate(manifest.files):
        holders = [rank for rank, paths in enumerate(everyones) if record.path in paths]
        if holders and holders[index % len(holders)] == dist.get_rank():
            found.append(record)
    return tuple(found)


def remove_others(folder: Path, name: str) -> None:
    """Remove this node's files of other checkpoints, which no job needs once the one of this name was resumed."""
    for path in folder.glob("global_step*"):
        if path.name != name:
            shutil.rmtree(path, ignore_errors=True)


def _has(folder: Path, record: FileRecord) -> bool:
    path = folder / record.path
    return path.is_file() and path.stat().st_size == record.size
