"""What tests share: the real S3 server, the real SLURM, and which worker of pytest-xdist runs what."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4
from zlib import crc32

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
    """The folders that take longest begin."""

    def place(item: pytest.Item) -> int:
        return next((i for i, folder in enumerate(LONGEST) if item.nodeid.startswith(folder)), len(LONGEST))

    items.sort(key=place)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """A test draws the same numbers whatever ran before it, also in the fixtures that it is the first to need."""
    import torch

    torch.manual_seed(crc32(item.nodeid.encode()))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A file's tests run on one worker, since they share fixtures; those of tests/e2e share a chain."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFixtures(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "e2e" if nodeid.startswith("tests/e2e/") else nodeid.split("::")[0]

    return ByFixtures(config, log)


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


@pytest.fixture(scope="session")
def ceph_endpoint() -> Iterator[S3Endpoint]:
    """Ceph's object gateway, started once per test session (about 20 s)."""
    from tests.ceph_s3 import ceph_s3, missing_programs

    if missing := missing_programs():
        pytest.skip(f"not installed: {', '.join(missing)} (packages radosgw, ceph-mon and ceph-osd)")
    with tempfile.TemporaryDirectory(prefix="ceph-") as folder, ceph_s3(Path(folder)) as endpoint:
        yield endpoint


@pytest.fixture
def no_aws_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No credentials but those of the environment."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


@pytest.fixture(scope="session")
def slurm_folder() -> Iterator[Path]:
    """SLURM on this machine, started once per test session (5 s, and a minute more where it is to be installed)."""
    scripts = Path(__file__).parents[1] / "infra" / "slurm"
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # short: a socket's path has 108 characters at most
    started = subprocess.run([scripts / "up", folder], capture_output=True, text=True, check=False, timeout=550)
    if started.returncode == 3:
        pytest.skip(started.stderr.strip())
    try:
        assert started.returncode == 0, f"{started.stdout}\n{started.stderr}"
        yield folder
    finally:
        subprocess.run([scripts / "down", folder], check=True, timeout=500)
        shutil.rmtree(folder)


@pytest.fixture
def slurm(slurm_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A real SLURM of 4 nodes; its folder."""
    monkeypatch.setenv("SLURM_CONF", str(slurm_folder / "etc" / "slurm.conf"))
    return slurm_folder
