"""What tells whether a file is as it was written."""

from __future__ import annotations

import hashlib
from pathlib import Path

_READ_SIZE = 1 << 22


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_READ_SIZE):
            digest.update(block)
    return digest.hexdigest()
