"""An artifact is built unless it is there and verifies: whether on a disk or in an object store."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from neox_core.artifact import Artifact, DigestCache, find_verified, publish


class ArtifactPlace(Protocol):
    """Where an artifact lies, or will."""

    def find(self, fingerprint: str) -> Artifact | None:
        """The finished, intact artifact of that fingerprint, if it lies here."""

    def publish(self, draft: Artifact) -> Artifact:
        """Write artifact.json, with a record of every file that lies here."""


def build_unless_verified(
    draft: Artifact,
    place: ArtifactPlace,
    build: Callable[[], Mapping[str, Any]],
    still_valid: Callable[[Artifact], bool] = lambda artifact: True,
) -> tuple[Artifact, bool]:
    """The artifact, and whether it was there.

    Args:
        draft: without files and summary.
        build: makes the files and returns the summary.
        still_valid: checks of an artifact that verifies what lies outside its place.
    """
    found = place.find(draft.fingerprint)
    if found is not None and still_valid(found):
        return found, True
    return place.publish(replace(draft, summary=build())), False


@dataclass(frozen=True)
class LocalPlace:
    """A folder on a disk, whose files verify by their SHA-256."""

    folder: Path
    cache: DigestCache

    def find(self, fingerprint: str) -> Artifact | None:
        """As `ArtifactPlace.find`."""
        return find_verified(self.folder, fingerprint, self.cache)

    def publish(self, draft: Artifact) -> Artifact:
        """As `ArtifactPlace.publish`."""
        return publish(draft, self.folder, self.cache)
