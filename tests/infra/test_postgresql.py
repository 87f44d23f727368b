"""`llemma up --database`: the server keeps its data in PostgreSQL; the password is in no command line and no file."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.infra.test_prefect_deployments import Prefect, serving, wait_for
from tests.postgresql import postgresql, programs
from tests.processes import command_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(programs() is None, reason="PostgreSQL is not installed: apt-get install postgresql"),
]

PASSWORD = "not-to-be-seen"


@pytest.fixture(scope="module")
def prefect(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prefect]:
    with tempfile.TemporaryDirectory(prefix="postgresql-") as folder:
        Path(folder).chmod(0o755)
        with (
            postgresql(Path(folder) / "server", PASSWORD) as url,
            serving(tmp_path_factory.mktemp("prefect"), "--database", url) as prefect,
        ):
            yield prefect


def test_flows_are_deployed_and_watched(prefect: Prefect) -> None:
    assert not list((prefect.folder / "home").glob("*.db"))
    assert len(prefect.find("deployments")) == 19

    def looks() -> list[str]:
        return [run["state"]["type"] for run in prefect.find("flow_runs", flows={"name": {"any_": ["watch"]}})]

    wait_for(lambda: "COMPLETED" in looks())
    assert "FAILED" not in looks()


def test_what_is_up_again_has_its_history(prefect: Prefect) -> None:
    before = {run["id"] for run in prefect.find("flow_runs") if run["state"]["type"] == "COMPLETED"}
    assert before
    prefect.llemma("down")
    prefect.llemma("up", "--port", str(prefect.port), *prefect.options)
    assert before <= {run["id"] for run in prefect.find("flow_runs")}


def test_the_password_is_not_to_be_seen(prefect: Prefect) -> None:
    home = prefect.folder / "home"
    files = [path for path in home.rglob("*") if path.is_file()]
    assert files
    assert not [path for path in files if PASSWORD.encode() in path.read_bytes()]
    mine = [process for process in psutil.process_iter() if str(home) in " ".join(command_of(process))]
    assert mine
    assert not [command for process in mine if PASSWORD in " ".join(command := command_of(process))]
