"""A stage whose process was killed is run again by its chain."""

from __future__ import annotations

from typing import Any
from uuid import UUID, uuid4

import pytest
from prefect.client.schemas.objects import FlowRun, State
from prefect.states import Completed, Crashed, Failed

from flows.flow_runs import deployed
from flows.flow_runs.deployed import parent_of, run_deployed
from neox_core.errors import LlemmaError


class Server:
    """Each try of the stage ends in the next state."""

    def __init__(self, *states: State) -> None:
        self.states, self.tries = list(states), 1
        self.run = FlowRun(flow_id=uuid4(), name="train toy", state=None)

    def read_flow_run(self, run: UUID) -> FlowRun:
        return self.run.model_copy(update={"state": self.states[self.tries - 1]})

    def set_flow_run_state(self, run: UUID, state: State, force: bool) -> None:
        assert (state.name, force) == ("AwaitingRetry", True)
        self.tries += 1

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *error: object) -> None:
        pass


def run(monkeypatch: pytest.MonkeyPatch, server: Server) -> None:
    def start(name: str, **given: Any) -> FlowRun:
        assert name == "train/toy"
        return server.run

    monkeypatch.setattr(deployed, "run_deployment", start)
    monkeypatch.setattr(deployed, "get_client", lambda sync_client: server)
    run_deployed("parent", "toy", "train", {}, 2)


def test_it_is_run_again_after_crashes(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server(Crashed(), Crashed(), Completed())
    run(monkeypatch, server)
    assert server.tries == 3


@pytest.mark.parametrize(
    ("states", "tries"), [((Crashed(message="killed"),) * 4, 3), ((Failed(message="refused"), Completed()), 1)]
)
def test_but_not_for_ever_and_not_after_a_failure(
    monkeypatch: pytest.MonkeyPatch, states: tuple[State, ...], tries: int
) -> None:
    server = Server(*states)
    with pytest.raises(LlemmaError, match=f"train: {states[0].message} .run 'train toy' ended {states[0].name}"):
        run(monkeypatch, server)
    assert server.tries == tries


def test_a_stages_run_knows_its_chain() -> None:
    parent = uuid4()
    stage = FlowRun(flow_id=uuid4(), idempotency_key=f"{parent}-prepare-data")
    assert parent_of(stage) == parent
    assert parent_of(FlowRun(flow_id=uuid4())) is None
    assert parent_of(FlowRun(flow_id=uuid4(), idempotency_key="scheduled 2026-11-28")) is None
