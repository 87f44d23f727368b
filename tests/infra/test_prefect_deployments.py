"""The commands against the server and worker of `llemma up`: run a stage, run it again, fail, cancel."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from infra.prefect.services import COMMAND, ServiceRecord
from infra.processes import ProcessRecord
from tests import waiting
from tests.e2e.runs import Run, copy_text, write_run
from tests.paths import ROOT
from tests.ports import free_port
from tests.tasks.watch.receiver import Receiver, receiving

PATIENCE_SECONDS = 480.0

pytestmark = pytest.mark.e2e

wait_for = partial(waiting.wait_for, seconds=PATIENCE_SECONDS, pause=0.2)


@dataclass(frozen=True)
class Prefect:
    """The `prefect` command in the environment of infra/prefect/env.sh, and what the server knows."""

    folder: Path
    port: int
    receiver: Receiver
    """Is told what there is to tell."""
    options: tuple[str, ...] = ()
    """Of `llemma up`."""

    def llemma(self, *arguments: str) -> str:
        """What `llemma` says with these words, from a folder that is not the repository's."""
        command = [str(ROOT / ".venv" / "bin" / "llemma"), *arguments]
        answer = subprocess.run(
            command, env=self._environment(), cwd=self.folder, capture_output=True, text=True, check=False
        )
        assert answer.returncode == 0, answer.stdout + answer.stderr
        return answer.stdout

    def run(self, *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        """Run a command to its end."""
        command, environment = self._command(*arguments), self._environment()
        return subprocess.run(
            command, env=environment, cwd=cwd or self.folder, capture_output=True, text=True, check=False
        )

    def find(self, what: str, **filters: Any) -> list[dict[str, Any]]:
        """What the API finds, newest last."""
        answer = httpx.post(f"http://127.0.0.1:{self.port}/api/{what}/filter", json=filters, timeout=60)
        return sorted(answer.raise_for_status().json(), key=lambda item: item["created"])

    def runs(self, config: Path) -> dict[str, dict[str, Any]]:
        """The state of the newest flow run of each flow of a configuration."""
        found = [run for run in self.find("flow_runs") if run["parameters"].get("config") == str(config)]
        return {run["name"].split()[0]: run["state"] for run in found}

    def artifact(self, key: str) -> dict[str, Any]:
        """The newest artifact of that key."""
        return self.find("artifacts", artifacts={"key": {"any_": [key]}})[-1]

    def _command(self, *arguments: str) -> list[str]:
        return [COMMAND, *arguments]

    def _environment(self) -> dict[str, str]:
        outside = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
        own = {"PREFECT_HOME": str(self.folder / "home"), "PREFECT_SERVER_API_PORT": str(self.port)}
        own["LLEMMA_NOTIFY_URLS"] = self.receiver.url("alerts")
        return outside | own | {"PREFECT_WORKER_QUERY_SECONDS": "1", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def prefect(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prefect]:
    """A server with all deployments and a worker."""
    with serving(tmp_path_factory.mktemp("prefect")) as prefect:
        yield prefect


@contextmanager
def serving(folder: Path, *options: str) -> Iterator[Prefect]:
    """A server with all deployments and a worker, which inherit the environment; with options of `llemma up`."""
    port = free_port()
    with receiving() as receiver:
        prefect = Prefect(folder, port, receiver, options)
        try:
            assert "worker: started" in prefect.llemma("up", "--port", str(port), *options)
            yield prefect
        finally:
            prefect.llemma("down")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """The path of a small run's configuration."""
    copy_text(tmp_path)
    return write_run(tmp_path)


def test_what_is_up_stays(prefect: Prefect) -> None:
    before = ServiceRecord.read(prefect.folder / "home", "worker")
    said = prefect.llemma("up")
    assert "server: is up already" in said
    assert "worker: is up already" in said
    assert f"pages: http://127.0.0.1:{prefect.port}" in said
    assert ServiceRecord.read(prefect.folder / "home", "worker") == before


def test_all_flows_are_deployed(prefect: Prefect) -> None:
    flows = {flow["id"]: flow["name"] for flow in prefect.find("flows")}
    names = {f"{flows[found['flow_id']]}/{found['name']}" for found in prefect.find("deployments")}
    assert len(names) == 19
    assert {"llemma-pretrain/toy", "llemma-pretrain/34b", "prepare-data/7b", "train/34b", "watch/llemma"} < names


def test_a_stage_runs_through_the_worker_and_is_skipped_the_next_time(prefect: Prefect, config: Path) -> None:
    for description in ("prepare-data took", "prepare-data was finished before"):
        watched = prefect.run("deployment", "run", "prepare-data/toy", "--param", f"config={config}", "--watch")
        assert watched.returncode == 0, watched.stdout + watched.stderr
        table = prefect.artifact("prepare-data-small")
        assert table["type"] == "table"
        assert table["description"].startswith(description)
        assert '"source": "arxiv"' in table["data"]
        assert prefect.artifact("prepare-data-progress-small")["data"] == 100
    assert prefect.runs(config)["prepare-data"]["type"] == "COMPLETED"


def test_the_reason_of_a_failure_is_one_line(prefect: Prefect, tmp_path: Path) -> None:
    missing = tmp_path / "missing.yml"
    watched = prefect.run("deployment", "run", "train/toy", "--param", f"config={missing}", "--watch")
    assert watched.returncode == 1
    (run,) = [run for run in prefect.find("flow_runs") if run["parameters"] == {"config": str(missing)}]
    assert run["state"]["type"] == "FAILED"
    reason = f"ConfigError: config file {missing} does not exist"
    assert run["state"]["message"] == f"Flow run encountered an exception: {reason}"


def test_cancel_ends_the_chain_its_stages_and_its_jobs(prefect: Prefect, tmp_path: Path) -> None:
    copy_text(tmp_path)
    # A training that does not end by itself while this test looks on.
    endless = {"steps": 100_000, "checkpoint_interval": 100_000, "validation": {"interval": 100_000}}
    config = write_run(tmp_path, {"train": endless, "data": {"max_epochs": 1_000_000}})
    prefect.run("deployment", "run", "llemma-pretrain/toy", "--param", f"config={config}")
    (parent,) = [run for run in prefect.find("flow_runs") if run["parameters"] == {"config": str(config)}]
    run = Run(config)
    wait_for(lambda: run.attempts("train") and run.attempts("evaluate"))
    cancelled = prefect.run("flow-run", "cancel", parent["id"])
    assert cancelled.returncode == 0, cancelled.stderr
    wait_for(lambda: prefect.runs(config)["llemma-pretrain"]["type"] == "CANCELLED")
    # The stages are runs of their own, which the chain's cancelling cancels: they end after it.
    wait_for(lambda: not {state["type"] for state in prefect.runs(config).values()} & {"RUNNING", "CANCELLING"})
    states = {flow: state["type"] for flow, state in prefect.runs(config).items()}
    assert states == {
        "llemma-pretrain": "CANCELLED",
        "prepare-data": "COMPLETED",
        "convert": "COMPLETED",
        "train": "CANCELLED",
        "evaluate": "CANCELLED",
    }
    wait_for(lambda: not run.processes())


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_after_kill_9_of_flows_and_worker_the_chain_goes_on_by_itself(prefect: Prefect, tmp_path: Path) -> None:
    copy_text(tmp_path)
    steps = 40
    config = write_run(tmp_path, {"train": {"steps": steps, "checkpoint_interval": 20, "validation": {"interval": 20}}})
    prefect.llemma("run", str(config), "prepare-data", "convert")
    chain = ("deployment", "run", "llemma-pretrain/toy", "--param", f"config={config}", "--param", "start_at=train")
    assert prefect.run(*chain).returncode == 0
    run = Run(config)
    wait_for(lambda: list(run.workdir.glob("scratch/train-*/metrics.jsonl")) and run.attempts("evaluate"), seconds=1500)
    worker = ServiceRecord.read(prefect.folder / "home", "worker")
    assert worker
    assert worker.service
    worker.service.send(signal.SIGKILL)
    engines = [ProcessRecord.of(process.pid) for process in flow_processes(prefect.folder / "home")]
    assert len(engines) >= 3  # the chain's, train's and evaluate's
    for engine in engines:
        engine.send(signal.SIGKILL)
    assert prefect.runs(config)["train"]["type"] == "RUNNING"
    wait_for(lambda: prefect.runs(config)["llemma-pretrain"]["type"] in ("COMPLETED", "FAILED"), seconds=1500)
    flows = ("llemma-pretrain", "train", "evaluate", "export")
    assert {flow: state["type"] for flow, state in prefect.runs(config).items()} == dict.fromkeys(flows, "COMPLETED")
    assert len(run.attempts("train")) == 1
    assert [row["step"] for row in run.rows() if "train/loss" in row] == list(range(1, steps + 1))
    page = f"http://127.0.0.1:{prefect.port}/runs/flow-run/"
    told: list[str] = []

    def finished() -> bool:
        told[:] = [line for line in prefect.receiver.messages("alerts") if str(run.workdir) in line]  # not others' runs
        return any("has finished" in line and page in line for line in told)

    wait_for(finished)
    assert len([line for line in told if "its process was gone: run again; job " in line]) == 1
    assert len([line for line in told if "has finished" in line]) == 1


def flow_processes(home: Path, runs: Collection[str] | None = None) -> list[psutil.Process]:
    """The processes of flow runs, or of those with these ids, without their jobs'."""
    found = []
    for process in psutil.process_iter():
        try:
            environment, command = process.environ(), " ".join(process.cmdline())
        except (psutil.Error, ProcessLookupError):
            continue
        run = environment.get("PREFECT__FLOW_RUN_ID")
        if environment.get("PREFECT_HOME") == str(home) and run and (runs is None or run in runs):
            found += [process] if "prefect" in command and "tasks.jobs" not in command else []
    return found
