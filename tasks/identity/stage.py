"""A stage: a function of its config and its input artifacts that yields an artifact, once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from neox_core.artifact import Artifact, DigestCache, find_verified, fingerprint
from neox_core.config import RunConfig
from neox_core.errors import LlemmaError
from neox_core.progress import Progress
from neox_core.storage.claims import claim, try_claim_name
from tasks.identity.once import LocalPlace, build_unless_verified


@dataclass(frozen=True)
class StageIdentity:
    """Which artifact, and where it lies; known without a look at what it was made from."""

    name: str
    """The stage's."""
    fingerprint: str
    workdir: Path
    weights: str | None = None
    """Of convert's: the identity of the weights in it, whatever layout they are cut for."""

    @property
    def folder(self) -> Path:
        """Where the artifact lies."""
        return self.workdir / f"{self.name}-{self.fingerprint[:16]}"


@dataclass(frozen=True)
class StageSpec:
    """What a stage's result depends on."""

    name: str
    config: RunConfig
    logical: Mapping[str, Any]
    """The config values that change the result."""
    inputs: Mapping[str, str]
    """Fingerprints of input artifacts, or digests of input files, by logical name."""

    @cached_property
    def fingerprint(self) -> str:
        """Identity of the result."""
        return fingerprint(self.name, self.logical, self.inputs)

    @property
    def identity(self) -> StageIdentity:
        """Which artifact it yields."""
        return StageIdentity(self.name, self.fingerprint, self.config.workdir)

    @property
    def folder(self) -> Path:
        """Where the artifact lies."""
        return self.identity.folder


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


def digest_cache(workdir: Path) -> DigestCache:
    """The memory of file digests that all stages of a run share."""
    return DigestCache(workdir / ".digests.json")


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
def try_claim(spec: StageSpec) -> Iterator[bool]:
    """Whether no other run is at work on the stage; if so, none can begin while the context lasts."""
    with try_claim_name(spec.config.workdir, spec.folder.name) as claimed:
        yield claimed


def _run_claimed(
    spec: StageSpec, build: Callable[[Path], Mapping[str, Any]], still_valid: Callable[[Artifact], bool]
) -> StageResult:
    def timed() -> Mapping[str, Any]:
        started = time.monotonic()
        spec.folder.mkdir(parents=True, exist_ok=True)
        return {**build(spec.folder), "seconds": round(time.monotonic() - started, 2)}

    draft = Artifact(spec.name, spec.fingerprint, spec.inputs, spec.config.model_dump(mode="json"), (), {})
    place = LocalPlace(spec.folder, digest_cache(spec.config.workdir))
    return StageResult(*build_unless_verified(draft, place, timed, still_valid))


def find(identity: StageIdentity) -> Artifact | None:
    """The stage's artifact if it is finished and intact."""
    return find_verified(identity.folder, identity.fingerprint, digest_cache(identity.workdir))


def require(identity: StageIdentity) -> Artifact:
    """The finished artifact of an earlier stage.

    Raises:
        LlemmaError: it is not there or does not verify.
    """
    artifact = find(identity)
    if artifact is None:
        raise LlemmaError(
            f"stage {identity.name} has no finished, intact artifact at {identity.folder}: {how_to_run(identity.name)}"
        )
    return artifact


def how_to_run(stage: str) -> str:
    """The way out for an error about a stage that is not finished."""
    return f"run it first, with `llemma run CONFIG {stage}`"
