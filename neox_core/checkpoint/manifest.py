"""Checkpoints in the object store: `<prefix>/global_stepN-A/<files>`, and `manifest.json` last.

A is the number of the job that has saved it, among the training's (lease.py); without `-A`, it has none.

A checkpoint exists when its manifest is there and every file that it lists has the size that it says. Anything else
is a checkpoint in the making, or the remains of one: never used, and never deleted here.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from neox_core.artifact import FileRecord
from neox_core.errors import CheckpointError
from neox_core.storage.digest import sha256_of
from neox_core.storage.object_store import ObjectInfos, ObjectStore

logger = logging.getLogger(__name__)

MANIFEST_FILE = "manifest.json"
_FOLDER = re.compile(r"global_step(\d+)(?:-(\d+))?")
_FETCHES = 3
"""Of content that is wrong each time, before it is called damaged."""
_PARALLEL = 4  # files at a time; large ones are also cut into parts


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint is made of and how far training was. JSON values only."""

    step: int
    sequences_consumed: int
    """The next step's first sequence: the sampler's whole state."""
    files: tuple[FileRecord, ...]
    """Paths are relative to the checkpoint's folder."""
    layout: Mapping[str, Any]
    """Ranks along 'tensor', 'pipeline' and 'data'; 'pipeline_layers', those of each stage, if there are several."""
    fingerprint: str
    """Of the train stage."""
    config: Mapping[str, Any]
    """The resolved configuration."""
    consumed: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """The ledger so far: sequences, tokens and epochs consumed per source."""
    software: Mapping[str, str] = field(default_factory=dict)
    skipped: Sequence[Mapping[str, int]] = field(default_factory=list)
    """Sequences among the consumed that training went back from: after_step, first, count of each window."""
    guard: Mapping[str, Any] = field(default_factory=dict)
    """What the guard decides by."""
    attempt: int = 0
    """Number of the job that has saved it, among the training's; 0: it had none."""

    @property
    def name(self) -> str:
        """Of the checkpoint's folder."""
        return checkpoint_key(self.step, self.attempt)

    def to_json(self) -> str:
        """As it is stored."""
        return json.dumps(asdict(self), indent=1, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Read what `to_json` wrote.

        Raises:
            CheckpointError: it is not a manifest, or names files outside its folder.
        """
        try:
            content = json.loads(text)
            files = tuple(FileRecord(**record) for record in content.pop("files"))
            manifest = cls(**content, files=files)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise CheckpointError(f"damaged {MANIFEST_FILE}: {type(error).__name__}: {error}") from None
        for record in files:
            path = PurePosixPath(record.path)
            if path.is_absolute() or ".." in path.parts:
                raise CheckpointError(f"{MANIFEST_FILE} of step {manifest.step} names a file outside: {record.path}")
        return manifest


def training_prefix(fingerprint: str) -> str:
    """Key below which the store holds the checkpoints of the training with this identity."""
    return f"train-{fingerprint[:16]}"


def checkpoint_key(step: int, attempt: int = 0) -> str:
    """Name of a step's checkpoint, as NeoX and DeepSpeed have it, with the number of the job that has saved it."""
    return f"global_step{step}" + (f"-{attempt}" if attempt else "")


def checkpoint_step(name: str) -> int | None:
    """The step whose checkpoint has this name; None if it is no checkpoint's."""
    match = _FOLDER.fullmatch(name)
    return int(match[1]) if match else None


def checkpoint_attempt(name: str) -> int:
    """The number of the job that has saved the checkpoint of this name; 0 if there is none."""
    match = _FOLDER.fullmatch(name)
    return int(match[2] or 0) if match else 0


def object_key(prefix: str, checkpoint: str, name: str) -> str:
    """Key of one file of a checkpoint, relative to the store.

    Args:
        checkpoint: its name.
    """
    return "/".join(part for part in (prefix.strip("/"), checkpoint, name) if part)


def publish_manifest(store: ObjectStore, prefix: str, manifest: Manifest) -> None:
    """Make a checkpoint exist: check that every file is there with its size, then write its manifest.

    Raises:
        CheckpointError: a file is missing or has another size; nothing is published.
        StorageError: the store cannot be reached.
    """
    sizes = {info.key: info.size for info in store.list(object_key(prefix, manifest.name, "") + "/")}
    if problem := _first_problem(sizes, prefix, manifest):
        raise CheckpointError(
            f"{store.url(object_key(prefix, manifest.name, ''))} is incomplete and is not published: {problem}"
        )
    store.put_text(object_key(prefix, manifest.name, MANIFEST_FILE), manifest.to_json())


def list_checkpoints(store: ObjectStore, prefix: str) -> list[Manifest]:
    """The complete checkpoints, sorted by step; incomplete ones are logged and left alone.

    Of a step that several jobs have saved, the last job's.

    Raises:
        StorageError: the store cannot be reached.
    """
    return complete_among(store, prefix, store.list(listing_key(prefix)))


def listing_key(prefix: str) -> str:
    """What all keys of a training begin with."""
    return f"{prefix.strip('/')}/" if prefix.strip("/") else ""


def complete_among(store: ObjectStore, prefix: str, listed: ObjectInfos) -> list[Manifest]:
    """As `list_checkpoints`, of what `listing_key` has listed already."""
    base = listing_key(prefix)
    sizes = {info.key: info.size for info in listed}
    folders = {key.removeprefix(base).rpartition("/")[0].split("/")[0] for key in sizes}
    names = [folder for folder in folders if checkpoint_step(folder) is not None]
    with ThreadPoolExecutor(_PARALLEL) as pool:
        found = pool.map(partial(_read_complete, store, prefix, sizes), names)
        whole = sorted((m for m in found if m), key=lambda manifest: (manifest.step, manifest.attempt))
    return list({manifest.step: manifest for manifest in whole}.values())


def _read_complete(store: ObjectStore, prefix: str, sizes: Mapping[str, int], name: str) -> Manifest | None:
    key = object_key(prefix, name, MANIFEST_FILE)
    try:
        manifest = _read_manifest(store, key) if key in sizes else None
    except CheckpointError as error:
        logger.warning("%s ignored: %s", store.url(key), error)
        return None
    if manifest is None:
        logger.info("%s has no manifest (yet): ignored", store.url(object_key(prefix, name, "")))
        return None
    if manifest.name != name:
        problem: str | None = f"its manifest is of step {manifest.step}, job {manifest.attempt}"
    else:
        problem = _first_problem(sizes, prefix, manifest)
    if problem:
        logger.warning("%s is incomplete and ignored: %s", store.url(object_key(prefix, name, "")), problem)
        return None
    return manifest


def _read_manifest(store: ObjectStore, key: str) -> Manifest | None:
    """A manifest; what is no manifest is fetched again, as it may have been damaged on its way."""
    for attempt in range(1, _FETCHES + 1):
        text = store.get_text(key)
        try:
            return None if text is None else Manifest.from_json(text)
        except CheckpointError:
            if attempt == _FETCHES:
                raise
    raise AssertionError("unreachable")


def _first_problem(sizes: Mapping[str, int], prefix: str, manifest: Manifest) -> str | None:
    for record in manifest.files:
        size = sizes.get(object_key(prefix, manifest.name, record.path))
        if size is None:
            return f"{record.path} is missing"
        if size != record.size:
            return f"{record.path} has {size} bytes instead of {record.size}"
    return None


def download_checkpoint(
    store: ObjectStore,
    prefix: str,
    manifest: Manifest,
    folder: Path,
    wanted: Callable[[str], bool],
    heartbeat: Callable[[], None] = lambda: None,
) -> Path:
    """Bring the wanted files of a checkpoint to `folder`/<its name>, in parallel, and verify each one's SHA-256.

    Files that are there already, with the right size and SHA-256, are not fetched again.

    Args:
        wanted: called with a file's path relative to the checkpoint; True for those to bring.
        heartbeat: called as the download makes progress.

    Returns:
        That folder.

    Raises:
        CheckpointError: a file's content is not what the manifest says.
        StorageError: a file cannot be fetched.
    """
    target = folder / manifest.name
    target.mkdir(parents=True, exist_ok=True)
    records = [record for record in manifest.files if wanted(record.path)]
    with ThreadPoolExecutor(_PARALLEL) as pool:
        list(pool.map(partial(_download, store, object_key(prefix, manifest.name, ""), target, heartbeat), records))
    return target


def _download(
    store: ObjectStore, checkpoint: str, target: Path, heartbeat: Callable[[], None], record: FileRecord
) -> None:
    path = target / record.path
    if path.is_file() and path.stat().st_size == record.size and sha256_of(path) == record.sha256:
        return
    key = f"{checkpoint}/{record.path}"
    for attempt in range(1, _FETCHES + 1):
        store.get_file(key, path, lambda _: heartbeat())
        found = sha256_of(path)
        if found == record.sha256:
            return
        path.unlink()
        logger.warning("%s came with SHA-256 %s (attempt %d of %d)", store.url(key), found, attempt, _FETCHES)
    raise CheckpointError(
        f"{store.url(key)} is damaged: SHA-256 {found} instead of {record.sha256}, {_FETCHES} times "
        "(`llemma checkpoint verify` tells which checkpoints are whole)"
    )
