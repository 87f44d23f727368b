"""Artifacts: what a stage yields. A folder whose `artifact.json` is written last and atomically.

The fingerprint hashes logical things only (config values, fingerprints of inputs, contents of files), never a
path, a host or a time, so that the same work has the same fingerprint wherever it is done.
"""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import neox_core
from neox_core.errors import CheckpointError
from neox_core.storage.atomic import write_atomically
from neox_core.storage.digest import sha256_of

ARTIFACT_FILE = "artifact.json"


@dataclass(frozen=True)
class FileRecord:
    """One file of an artifact; `path` is relative to the artifact's folder, size in bytes."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Artifact:
    """A finished stage's result."""

    name: str
    fingerprint: str
    inputs: Mapping[str, str]
    """Fingerprints of the artifacts that it was made from, by name."""
    config: Mapping[str, Any]
    """The resolved configuration that it was made with."""
    files: tuple[FileRecord, ...]
    summary: Mapping[str, Any]
    """What the stage found out: counts, differences, losses. JSON values only."""
    software: Mapping[str, str] = field(default_factory=dict)
    folder: Path = Path()
    """Where it lies; not part of artifact.json."""


def fingerprint(name: str, logical: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """Hash a stage's name, the config values that matter to it, and its inputs' fingerprints (64 hex digits).

    Raises:
        TypeError, ValueError: a value is not plain JSON, so that another process might hash it differently.
    """
    content = json.dumps(
        {"name": name, "config": logical, "inputs": inputs},
        sort_keys=True,
        allow_nan=False,
        separators=(",", ":"),
    )
    return hashlib.sha256(content.encode()).hexdigest()


class DigestCache:
    """SHA-256 of files, remembered by path, size and modification time, so that a second look costs a stat.

    The cache is a JSON file; it is only a memory, and losing it costs time alone.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known = self._load()

    def _load(self) -> dict[str, list[Any]]:
        try:
            known = json.loads(self._path.read_text())
        except (OSError, ValueError):
            return {}
        if not isinstance(known, dict):
            return {}
        return {path: entry for path, entry in known.items() if isinstance(entry, list) and len(entry) == 3}

    def remember(self, folder: Path, records: Iterable[FileRecord]) -> None:
        """Take over digests that were computed while the files in `folder` were written."""
        self._known = self._load()
        for record in records:
            path = (folder / record.path).resolve()
            self._known[str(path)] = [record.size, path.stat().st_mtime_ns, record.sha256]
        write_atomically(self._path, json.dumps(self._known))

    def digest(self, path: Path) -> str:
        """SHA-256 of the file's content, in hex."""
        return self.digests([path])[0]

    def digests(self, paths: Iterable[Path]) -> list[str]:
        """SHA-256 of each file's content, hashed in parallel where not remembered.

        The digest of a file that changes meanwhile is not remembered, so that the next call hashes it again.
        """
        wanted = [path.resolve() for path in paths]
        stale = [path for path in wanted if self._recall(path) is None]
        if stale:  # another holder of the same file may have remembered them meanwhile
            self._known |= self._load()
            stale = [path for path in wanted if self._recall(path) is None]
        fresh: dict[str, str] = {}
        if stale:
            with ThreadPoolExecutor() as pool:
                for path, (entry, steady) in zip(stale, pool.map(_measure, stale), strict=True):
                    fresh[str(path)] = entry[2]
                    if steady:
                        self._known[str(path)] = entry
            write_atomically(self._path, json.dumps(self._known))
        return [fresh.get(str(path)) or self._known[str(path)][2] for path in wanted]

    def _recall(self, path: Path) -> str | None:
        stat = path.stat()
        size, mtime, digest = self._known.get(str(path), (None, None, None))
        return digest if (size, mtime) == (stat.st_size, stat.st_mtime_ns) else None


def _measure(path: Path) -> tuple[list[Any], bool]:
    """Size, modification time in ns and SHA-256 of a file, and whether it stayed the same while it was hashed."""
    before = path.stat()
    digest = sha256_of(path)
    after = path.stat()
    steady = (before.st_size, before.st_mtime_ns) == (after.st_size, after.st_mtime_ns)
    return [after.st_size, after.st_mtime_ns, digest], steady


def publish(artifact: Artifact, folder: Path, cache: DigestCache) -> Artifact:
    """Record every file in `folder` and write artifact.json last; `artifact.files` is filled in here."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    paths = [path for path in paths if path.name != ARTIFACT_FILE]
    records = tuple(
        FileRecord(path.relative_to(folder).as_posix(), path.stat().st_size, digest)
        for path, digest in zip(paths, cache.digests(paths), strict=True)
    )
    write_atomically(folder / ARTIFACT_FILE, artifact_text(replace(artifact, files=records, software=software())))
    return read_artifact(folder)


def artifact_text(artifact: Artifact) -> str:
    """The content of artifact.json."""
    content = asdict(artifact)
    del content["folder"]
    return json.dumps(content, indent=1, sort_keys=True)


def parse_artifact(text: str, folder: Path) -> Artifact:
    """What `artifact_text` wrote; raises ValueError, TypeError or KeyError if it is damaged."""
    content = json.loads(text)
    content["files"] = tuple(FileRecord(**record) for record in content["files"])
    return Artifact(**content, folder=folder)


def read_artifact(folder: Path) -> Artifact:
    """Read a folder's artifact.json without checking its files.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    try:
        return parse_artifact((folder / ARTIFACT_FILE).read_text(encoding="utf-8"), folder)
    except FileNotFoundError:
        raise CheckpointError(f"{folder} holds no {ARTIFACT_FILE}: the stage that makes it has not finished") from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"{folder / ARTIFACT_FILE} is damaged ({error}): delete the folder to rebuild it"
        ) from None


def find_verified(folder: Path, expected_fingerprint: str, cache: DigestCache) -> Artifact | None:
    """The artifact in `folder` if it is finished, has that fingerprint, and every file is as recorded; else None."""
    try:
        artifact = read_artifact(folder)
    except CheckpointError:
        return None
    paths = [folder / record.path for record in artifact.files]
    if artifact.fingerprint != expected_fingerprint or not all(path.is_file() for path in paths):
        return None
    if any(path.stat().st_size != record.size for path, record in zip(paths, artifact.files, strict=True)):
        return None
    if cache.digests(paths) != [record.sha256 for record in artifact.files]:
        return None
    return artifact


def software() -> dict[str, str]:
    """Versions that a result may depend on, and the git revision of this code ('' outside a checkout)."""
    from importlib.metadata import PackageNotFoundError, version  # slow to import, for processes that make no artifact

    versions = {
        "llemma-pretrain": neox_core.__version__,
        "python": platform.python_version(),
        "git": _git_revision(),
    }
    for package in ("torch", "deepspeed", "transformers", "sentencepiece", "numpy"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def _git_revision() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
