"""One Prefect server and one finished chain for all end-to-end tests."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from prefect.settings import PREFECT_API_URL, PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings

from infra.prefect_server import own_prefect_server
from tests.e2e.runs import Run, copy_text, write_run
from tests.waiting import wait_for

if TYPE_CHECKING:
    from tasks.report.run_report import RunReport


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The server of a run that has none, with a database of its own; heartbeats off, which cost a second per flow.

    Not Prefect's test harness: it gives up when a busy machine does not answer its first question within 5 s.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PREFECT_HOME", str(tmp_path_factory.mktemp("prefect")))
        patch.setenv("LLEMMA_PREFECT_OWNER", "")  # restored afterwards
        patch.delenv("PREFECT_API_URL", raising=False)
        with own_prefect_server():
            settings = {PREFECT_API_URL: os.environ["PREFECT_API_URL"], PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}
            with temporary_settings(settings):
                yield


@dataclass(frozen=True)
class Chain:
    """The finished chain: how it was run and what its flow returned."""

    run: Run
    slurm: Path | None
    """SLURM's folder; None: it could not be brought up here, and the jobs were processes."""
    report: RunReport
    left_running: tuple[str, ...]
    """What still ran on its behalf when it had ended."""


@pytest.fixture(scope="session")
def slurm_if_possible(request: pytest.FixtureRequest) -> Path | None:
    """SLURM's folder where it can be brought up: as root, where its packages are or can be installed."""
    try:
        folder: Path = request.getfixturevalue("slurm_folder")
    except pytest.skip.Exception:
        return None
    return folder


@pytest.fixture(scope="session")
def chain(prefect_server: None, slurm_if_possible: Path | None, tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """The whole chain, run once, on SLURM if possible. Tests read it and change copies only."""
    from flows.llemma_pretrain import llemma_pretrain

    folder, slurm = tmp_path_factory.mktemp("chain"), slurm_if_possible
    copy_text(folder)
    launch = {"executor": "slurm", "slurm_parameters": {"mem": "4G"}} if slurm else {"executor": "local"}
    run = Run(write_run(folder, {"wandb": {"mode": "offline"}, "launch": launch}))
    with pytest.MonkeyPatch.context() as patch:
        if slurm:
            patch.setenv("SLURM_CONF", str(slurm / "etc" / "slurm.conf"))
        report = llemma_pretrain(str(run.path))
    if slurm:  # it ends a job's processes a moment after their results are there
        with suppress(AssertionError):
            wait_for(lambda: not run.processes(), seconds=300)
    return Chain(run, slurm, report, tuple(map(str, run.processes())))


@pytest.fixture
def copied(chain: Chain, tmp_path: Path) -> Callable[..., Run]:
    """Makes a run like the chain in a folder of its own, with the named parts of its workdir."""

    def copy(*patterns: str) -> Run:
        source = chain.run.path.parent
        changes = {"data": {"input": str(source / "text")}, "base_model": {"path": str(source / "base")}}
        run = Run(write_run(tmp_path, changes))
        for pattern in patterns:
            for path in chain.run.workdir.glob(pattern):
                shutil.copytree(path, run.workdir / path.name)
        return run

    return copy
