"""What stands at a location, before anything is read of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from neox_core.errors import CheckpointError
from neox_core.storage.folders import LocalFolder, check_exists


def test_what_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    check_exists(LocalFolder(tmp_path))
    with pytest.raises(CheckpointError, match=r"model.safetensors is a file: give the folder of the checkpoint"):
        check_exists(LocalFolder(tmp_path / "model.safetensors"))
    with pytest.raises(CheckpointError, match=r"checkpoint folder .*/nothing does not exist"):
        check_exists(LocalFolder(tmp_path / "nothing"))
