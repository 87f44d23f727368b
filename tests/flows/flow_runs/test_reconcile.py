"""What becomes of a flow run whose process is gone, by its state, its job and its chain."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import UUID, uuid4

import pytest
from prefect.client.schemas.objects import FlowRun, State
from prefect.states import Cancelling, Completed, Crashed, Failed, Pending, Running

from flows.flow_runs import reconcile
from flows.flow_runs.at_work import at_work
from flows.flow_runs.reconcile import Reconciler
from infra.prefect.services import WORKER, ServiceRecord
from infra.processes import ProcessRecord
from neox_core.config import RunConfig, load_config
from neox_core.storage.claims import claim_file
from tasks.jobs.retry import NoAnswer
from tasks.watch.memory import Memory
from tasks.watch.verdict import Verdict
from tests.paths import CONFIGS

GOES_ON = Verdict(True, "job 7 is running")
REFUSES = Verdict(False, "job 7 failed: the loss is not finite")


class Server:
    """What the reconciler asks of Prefect's server."""

    def __init__(self) -> None:
        self.runs: dict[UUID, FlowRun] = {}
        self.on_read: Callable[[FlowRun], None] = lambda run: None

    def add(self, state: State, *, seconds: float = 3600.0, parent: FlowRun | None = None) -> FlowRun:
        state.timestamp = datetime.now(UTC) - timedelta(seconds=seconds)
        key = f"{parent.id}-train" if parent else None
        run = FlowRun(flow_id=uuid4(), name="train toy", state=state, idempotency_key=key, parameters={"config": "x"})
        self.runs[run.id] = run
        return run.model_copy()

    def read_flow_run(self, run: UUID) -> FlowRun:
        self.on_read(self.runs[run])
        return self.runs[run]

    def read_flow_run_states(self, run: UUID) -> list[State]:
        return [Running(timestamp=datetime.now(UTC))]

    def read_flow(self, flow: UUID) -> Any:
        return SimpleNamespace(name="train")

    def set_flow_run_state(self, run: UUID, state: State, force: bool) -> None:
        assert force
        self.runs[run].state = state


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    monkeypatch.setattr(reconcile, "_SURE_SECONDS", 0.0)
    monkeypatch.setattr(reconcile, "find_training", lambda config: None)
    return Server()


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return load_config(CONFIGS / "toy.yml").model_copy(update={"workdir": tmp_path})


@pytest.fixture
def look(server: Server, config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> Callable[..., State]:
    """Reconcile a run; its state then."""

    def reconciled(run: FlowRun, found: Verdict = GOES_ON) -> State:
        monkeypatch.setattr(reconcile, "verdict", lambda config, since: found)
        client: Any = server
        Reconciler(client, config, Memory.of(config.workdir), 90.0).reconcile(run)
        state = server.runs[run.id].state
        assert state
        return state

    return reconciled


def die(config: RunConfig, run: FlowRun) -> FlowRun:
    """As if the run's process had been killed."""
    file = claim_file(config.workdir, f"flow-{run.id}")
    file.parent.mkdir(exist_ok=True)
    file.touch()
    return run


def test_a_run_whose_process_was_killed_is_run_again(server: Server, config: RunConfig, look: Any) -> None:
    run = die(config, server.add(Running()))
    state = look(run)
    assert (state.name, state.message) == ("AwaitingRetry", "its process was gone: run again; job 7 is running")
    assert not claim_file(config.workdir, f"flow-{run.id}").exists()
    assert look(run).id == state.id  # with what another watcher had seen before


def test_a_run_that_lives_or_may_be_starting_is_left_alone(server: Server, config: RunConfig, look: Any) -> None:
    alive = server.add(Running())
    with at_work(config.workdir, str(alive.id)):
        assert look(alive).name == "Running"
    assert look(die(config, server.add(Running(), seconds=60))).name == "Running"
    assert look(die(config, server.add(Pending(), seconds=300))).name == "Pending"  # the file is an earlier attempt's
    assert look(server.add(Running(), seconds=300)).name == "Running"
    assert look(server.add(Pending())).name == "AwaitingRetry"
    assert look(server.add(Running())).name == "AwaitingRetry"


@pytest.mark.parametrize(
    ("pending", "worker", "found"),
    [(300, 100, "AwaitingRetry"), (300, 400, "Pending"), (300, None, "Pending"), (150, 100, "Pending")],
)
def test_a_run_that_a_dead_worker_had_taken_is_run_again_sooner(
    server: Server,
    look: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    pending: int,
    worker: int | None,
    found: str,
) -> None:
    """Ages in seconds; None: of a worker that is not ours nothing is known."""
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    if worker is not None:
        here = ProcessRecord.of(os.getpid())
        ServiceRecord(here, ProcessRecord(here.pid, time.time() - worker), 4200).write(tmp_path, WORKER)
    assert look(server.add(Pending(), seconds=pending)).name == found
    assert look(server.add(Running(), seconds=pending)).name == "Running", "its process may be starting"


def test_the_jobs_own_end_decides(server: Server, config: RunConfig, look: Any) -> None:
    state = look(die(config, server.add(Running())), REFUSES)
    assert (state.name, state.message) == ("Failed", f"{REFUSES.text} (its process is gone too)")
    assert look(server.add(Crashed()), REFUSES).name == "Failed"


def test_nothing_is_done_while_the_scheduler_is_silent(
    server: Server, config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def silent(config: RunConfig, since: float) -> Verdict:
        raise NoAnswer("squeue does not answer")

    monkeypatch.setattr(reconcile, "verdict", silent)
    run = die(config, server.add(Running()))
    client: Any = server
    with pytest.raises(NoAnswer):
        Reconciler(client, config, Memory.of(config.workdir), 90.0).reconcile(run)
    assert server.runs[run.id].state == run.state


def test_a_chain_runs_its_stages_again_itself(server: Server, config: RunConfig, look: Any) -> None:
    chain = server.add(Running())
    stage = die(config, server.add(Running(), parent=chain))
    assert look(stage).name == "Crashed"
    assert look(server.add(Crashed(), parent=chain)).name == "Crashed"
    assert look(die(config, server.add(Running(), parent=server.add(Failed())))).name == "AwaitingRetry"
    assert look(die(config, server.add(Running(), parent=server.add(Completed())))).name == "AwaitingRetry"


def test_a_run_that_crashed_is_run_again_until_restarts_are_used_up(
    server: Server, config: RunConfig, look: Any
) -> None:
    run = server.add(Crashed())
    for _ in range(config.launch.max_restarts):
        assert look(run).name == "AwaitingRetry"
        server.runs[run.id].state = run.state
    state = look(run)
    assert state.name == "Failed"
    assert "gone more than 5 times (launch.max_restarts) without a new checkpoint; job 7 is running" in state.message


@pytest.fixture
def cancelled(monkeypatch: pytest.MonkeyPatch) -> list[UUID]:
    """The runs whose hook was called."""
    from flows.llemma_pretrain import FLOWS

    called: list[UUID] = []
    monkeypatch.setattr(FLOWS["train"], "on_cancellation_hooks", [lambda flow, run, state: called.append(run.id)])
    return called


def test_cancelling_is_finished_with_the_flows_hooks(
    server: Server, config: RunConfig, look: Any, cancelled: list[UUID]
) -> None:
    run = die(config, server.add(Cancelling()))
    assert look(run).name == "Cancelled"
    assert cancelled == [run.id]


def test_a_process_that_was_not_told_of_its_cancelling_is_ended(
    server: Server, config: RunConfig, look: Any, cancelled: list[UUID], monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[str] = []
    monkeypatch.setattr(reconcile, "end_process", lambda workdir, run: ended.append(run))
    run, just_now = server.add(Cancelling()), server.add(Cancelling(), seconds=30)
    with at_work(config.workdir, str(run.id)), at_work(config.workdir, str(just_now.id)):
        assert look(just_now).name == look(run).name == "Cancelling"
    assert (ended, cancelled) == ([str(run.id)], [])
    assert look(run).name == "Cancelled"
    assert cancelled == [run.id]


def test_a_state_that_somebody_has_set_meanwhile_stays(server: Server, config: RunConfig, look: Any) -> None:
    def cancel(run: FlowRun) -> None:
        run.state = Cancelling()

    server.on_read = cancel
    assert look(die(config, server.add(Running()))).name == "Cancelling"
