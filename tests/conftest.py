"""What tests of several folders share: the real S3 server, and which worker of pytest-xdist runs what."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

import pytest

if TYPE_CHECKING:  # the tests of tests/gpu run where these cannot be imported
    from infra.s3.server import S3Endpoint
    from neox_core.config import StorageConfig
    from neox_core.storage.object_store import ObjectStore


if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: workers share the cores

LONGEST = ("tests/e2e", "tests/neox_core/train", "tests/neox_core/parallel", "tests/infra", "tests/tasks")
"""Folders whose tests begin first, so that no worker is left alone with them at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A file's tests run on one worker, since they share fixtures; those of tests/e2e all on one, with one chain."""

    def place(item: pytest.Item) -> int:
        return next((i for i, folder in enumerate(LONGEST) if item.nodeid.startswith(folder)), len(LONGEST))

    items.sort(key=place)
    for item in items:
        file = item.nodeid.split("::")[0]
        item.add_marker(pytest.mark.xdist_group("e2e" if file.startswith("tests/e2e") else file))


@pytest.fixture(scope="session")
def s3_endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Endpoint]:
    """The embedded S3 server, started once per test session (about a second)."""
    from infra.s3.embedded import embedded_s3

    with embedded_s3(tmp_path_factory.mktemp("s3")) as endpoint:
        yield endpoint


@pytest.fixture
def storage_config(s3_endpoint: S3Endpoint, monkeypatch: pytest.MonkeyPatch) -> StorageConfig:
    """A prefix in a fresh bucket of the embedded server, with its keys in the environment."""
    from neox_core.config import StorageConfig
    from neox_core.storage.object_store import ObjectStore

    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3_endpoint.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3_endpoint.secret_key)
    config = StorageConfig(url=f"s3://test-{uuid4().hex}/some/prefix", endpoint_url=s3_endpoint.url)
    ObjectStore(config).check(create_bucket=True)
    return config


@pytest.fixture
def store(storage_config: StorageConfig) -> ObjectStore:
    """An object store in a fresh bucket of the embedded server."""
    from neox_core.storage.object_store import ObjectStore

    return ObjectStore(storage_config)


@pytest.fixture
def no_aws_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No credentials but those of the environment."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
