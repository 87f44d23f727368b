"""What stands at a location, before anything is read of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from neox_core.errors import CheckpointError, ConfigError
from neox_core.storage.folders import LocalFolder, check_exists, storage_at


def test_what_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    check_exists(LocalFolder(tmp_path))
    with pytest.raises(CheckpointError, match=r"model.safetensors is a file: give the folder of the checkpoint"):
        check_exists(LocalFolder(tmp_path / "model.safetensors"))
    with pytest.raises(CheckpointError, match=r"checkpoint folder .*/nothing does not exist"):
        check_exists(LocalFolder(tmp_path / "nothing"))


def test_an_environment_without_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3", raising=False)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "localhost:9000")
    with pytest.raises(ConfigError, match=r"^AWS_ENDPOINT_URL: 'localhost:9000' is not an address such as https://"):
        storage_at("s3://bucket/x")
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    with pytest.raises(ConfigError, match=r"^s3:///: String should match"):
        storage_at("s3:///")
