"""A stage: a function of its config and its input artifacts that yields an artifact, once."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neox_core.artifact import Artifact, DigestCache, find_verified, fingerprint, publish
from neox_core.config import RunConfig
from neox_core.errors import LlemmaError
from neox_core.progress import Progress

_CLAIM_SECONDS = 1.0
"""How often a stage that another run is at work on is tried again."""


@dataclass(frozen=True)
class StageSpec:
    """What a stage's result depends on."""

    name: str
    config: RunConfig
    logical: Mapping[str, Any]
    """The config values that change the result."""
    inputs: Mapping[str, str]
    """Fingerprints of input artifacts, or digests of input files, by logical name."""

    @property
    def fingerprint(self) -> str:
        """Identity of the result."""
        return fingerprint(self.name, self.logical, self.inputs)

    @property
    def folder(self) -> Path:
        """Where the artifact lies."""
        return self.config.workdir / f"{self.name}-{self.fingerprint[:16]}"


@dataclass(frozen=True)
class StageResult:
    """A finished stage."""

    artifact: Artifact
    skipped: bool
    """It was finished before and nothing was done."""

    @property
    def seconds(self) -> float:
        """How long it took to make the artifact."""
        return float(self.artifact.summary["seconds"])


def digest_cache(config: RunConfig) -> DigestCache:
    """The memory of file digests that all stages of a run share."""
    return DigestCache(config.workdir / ".digests.json")


def run_stage(
    spec: StageSpec,
    build: Callable[[Path], Mapping[str, Any]],
    progress: Progress,
    still_valid: Callable[[Artifact], bool] = lambda artifact: True,
) -> StageResult:
    """Return the stage's artifact, building it if no verified one exists. One run at a time: others wait.

    Args:
        build: fills the folder, resuming from what an interrupted call left there, and returns the summary.
        still_valid: checks what lies outside the artifact's folder.
    """
    with claim(spec.config.workdir, spec.folder.name, "this stage", progress):
        return _run_claimed(spec, build, still_valid)


@contextmanager
def claim(workdir: Path, name: str, what: str, progress: Progress) -> Iterator[None]:
    """Have something in a workdir for this run alone while the context lasts; wait for a run that has it now.

    Args:
        what: says it in the progress while waiting.
    """
    while True:
        with try_claim_name(workdir, name) as claimed:
            if claimed:
                yield
                return
        progress(0.0, f"another run is at work on {what}: waiting for it")
        time.sleep(_CLAIM_SECONDS)


@contextmanager
def try_claim(spec: StageSpec) -> Iterator[bool]:
    """Whether no other run is at work on the stage; if so, none can begin while the context lasts.

    The kernel drops the claim of a process that dies.
    """
    with try_claim_name(spec.config.workdir, spec.folder.name) as claimed:
        yield claimed


@contextmanager
def try_claim_name(workdir: Path, name: str) -> Iterator[bool]:
    """As `try_claim`, of anything in a workdir."""
    path = workdir / ".claims" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            claimed = True
        except BlockingIOError:
            claimed = False
        yield claimed


def _run_claimed(
    spec: StageSpec, build: Callable[[Path], Mapping[str, Any]], still_valid: Callable[[Artifact], bool]
) -> StageResult:
    cache = digest_cache(spec.config)
    finished = find_verified(spec.folder, spec.fingerprint, cache)
    if finished is not None and still_valid(finished):
        return StageResult(finished, skipped=True)
    started = time.monotonic()
    spec.folder.mkdir(parents=True, exist_ok=True)
    summary = build(spec.folder)
    draft = Artifact(
        name=spec.name,
        fingerprint=spec.fingerprint,
        inputs=spec.inputs,
        config=spec.config.model_dump(mode="json"),
        files=(),
        summary={**summary, "seconds": round(time.monotonic() - started, 2)},
    )
    return StageResult(publish(draft, spec.folder, cache), skipped=False)


def require(spec: StageSpec) -> Artifact:
    """The finished artifact of an earlier stage.

    Raises:
        LlemmaError: it is not there or does not verify.
    """
    artifact = find_verified(spec.folder, spec.fingerprint, digest_cache(spec.config))
    if artifact is None:
        raise LlemmaError(f"stage {spec.name} has no finished, intact artifact at {spec.folder}: run {spec.name} first")
    return artifact
