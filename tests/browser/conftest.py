"""A browser, a Prefect server with a worker, and SLURM."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.infra.test_prefect_deployments import Prefect, serving


@pytest.fixture(scope="module")
def prefect_on_slurm(slurm_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prefect]:
    """A server and a worker whose jobs go to SLURM."""
    os.environ["SLURM_CONF"] = str(slurm_folder / "etc" / "slurm.conf")
    try:
        with serving(tmp_path_factory.mktemp("prefect")) as prefect:
            yield prefect
    finally:
        del os.environ["SLURM_CONF"]
