"""One line says what, where and what next, with a link."""

from __future__ import annotations

from pathlib import Path
from uuid import UUID, uuid4

import pytest
from prefect.client.schemas.objects import FlowRun, State
from prefect.settings import PREFECT_UI_URL, temporary_settings
from prefect.states import Completed, Failed, Running

from flows.flow_runs.telling import tell_news
from neox_core.config import RunConfig, load_config
from tasks.watch.memory import Memory
from tasks.watch.notify import Event
from tests.paths import CONFIGS
from tests.tasks.watch.receiver import Receiver, receiving

ID = UUID("0f3c0000-0000-4000-8000-000000000000")


def run_in(state: State, name: str = "llemma-pretrain toy", parent: UUID | None = None) -> FlowRun:
    key = f"{parent}-train" if parent else None
    return FlowRun(id=uuid4() if parent else ID, flow_id=uuid4(), name=name, state=state, idempotency_key=key)


def news(
    monkeypatch: pytest.MonkeyPatch, config: RunConfig, runs: list[FlowRun], reconciled: list[Event] | None = None
) -> list[str]:
    with receiving() as receiver, temporary_settings({PREFECT_UI_URL: "http://127.0.0.1:4200"}):
        monkeypatch.setenv("LLEMMA_NOTIFY_URLS", receiver.url("alerts"))
        for _ in range(2):
            tell_news(config, runs, reconciled or [], Memory.of(config.workdir))
        return messages(receiver)


def messages(receiver: Receiver) -> list[str]:
    return receiver.messages("alerts")


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return load_config(CONFIGS / "toy.yml").model_copy(update={"workdir": tmp_path})


def test_a_failure_of_a_chain_is_told_once_with_its_stages_reason(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    reason = "Flow run encountered an exception: LlemmaError: train: job 7 failed,\n rank 1 first"
    stage = run_in(Failed(message="the stage's own"), "train toy", parent=ID)
    (line,) = news(monkeypatch, config, [run_in(Failed(message=reason)), stage])
    assert line == (
        f"toy in {config.workdir}: llemma-pretrain toy failed: LlemmaError: train: job 7 failed, rank 1 first; next: "
        f"mend the cause, then Retry on the run's page goes on http://127.0.0.1:4200/runs/flow-run/{ID}"
    )


def test_an_end_and_a_restart(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    restart = Event("restart", "r", "train: its process was gone", "nothing")
    first, second = news(monkeypatch, config, [run_in(Completed())], [restart])
    assert first.startswith(f"toy in {config.workdir}: train: its process was gone; next: nothing http://")
    assert f"llemma-pretrain toy has finished; next: nothing http://127.0.0.1:4200/runs/flow-run/{ID}" in second


def test_only_what_the_configuration_wants_is_told(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = config.model_copy(update={"notify": config.notify.model_copy(update={"events": ("failure",)})})
    assert news(monkeypatch, wanted, [run_in(Completed()), run_in(Running())]) == []
