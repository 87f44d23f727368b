"""Digests of files."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from neox_core.storage import digest


def test_large_files_are_hashed_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digest, "_READ_SIZE", 7)
    (tmp_path / "data").write_bytes(bytes(range(100)))
    assert digest.sha256_of(tmp_path / "data") == hashlib.sha256(bytes(range(100))).hexdigest()
