"""Flow: a look at every run and its jobs, each minute; see docs/cluster.md."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from prefect import flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.sorting import FlowRunSort

from flows.flow_runs.following import show_progress
from flows.flow_runs.reconcile import Reconciler
from flows.flow_runs.telling import tell_news
from neox_core.config import RunConfig, load_config
from neox_core.errors import LlemmaError
from neox_core.storage.claims import try_claim_name
from tasks.watch.memory import Memory
from tasks.watch.notify import Event

_log = logging.getLogger(__name__)

TAG = "llemma"
_UNSETTLED = ("RUNNING", "PENDING", "CANCELLING")
_ENDED = ("CRASHED", "FAILED", "COMPLETED")
_RECENT = timedelta(days=1)
_CLAIM = "watch"


@dataclass(frozen=True)
class Watched:
    """A configuration with its flow runs, the newest first."""

    config: RunConfig
    runs: list[FlowRun] = field(default_factory=list)


@flow(name="watch", log_prints=False)
def watch(grace_seconds: float = 90.0) -> None:
    """Look at every run of the last day and those that have not ended: reconcile, report progress, tell somebody.

    Args:
        grace_seconds: how long a run must have been in its state before its process can be found to be gone.
    """
    with get_client(sync_client=True) as client:
        for watched in _watched(client):
            with try_claim_name(watched.config.workdir, _CLAIM) as claimed:
                if claimed:  # else another watcher is at work
                    _look_after(client, watched, grace_seconds)
        _forget_old(client)


def _look_after(client: SyncPrefectClient, watched: Watched, grace_seconds: float) -> None:
    """One step after the other; what fails keeps no other step, nor the other configurations."""
    config, memory, done = watched.config, Memory.of(watched.config.workdir), list[Event]()
    reconciler = Reconciler(client, config, memory, grace_seconds)

    def reconcile() -> None:
        for run in _to_reconcile(watched.runs):
            state = reconciler.reconcile(run)
            if state and state.is_scheduled():
                todo = "nothing, unless it happens again"
                done.append(Event("restart", f"run again {state.id}", f"{run.name}: {state.message}", todo))

    for step in (
        reconcile,
        lambda: show_progress(client, config),
        lambda: tell_news(config, watched.runs, done, memory),
    ):
        try:
            step()
        except (LlemmaError, OSError) as error:
            _log.warning("%s: %s", config.name, error)


def _to_reconcile(runs: list[FlowRun]) -> Iterator[FlowRun]:
    """Those that have not ended; and those that crashed, unless there is a newer one of the same flow."""
    seen = set()
    for run in runs:
        state = run.state
        if state and (state.type.value in _UNSETTLED or (state.is_crashed() and run.deployment_id not in seen)):
            yield run
        seen.add(run.deployment_id)


def _watched(client: SyncPrefectClient) -> list[Watched]:
    """By configuration and overrides; those that cannot be read are left to their flows, which say so."""
    found: dict[str, Watched | None] = {}
    for run in _runs(client, {"state": {"type": {"any_": _UNSETTLED}}}) + _runs(
        client,
        {
            "state": {"type": {"any_": _ENDED}},
            "end_time": {"after_": (datetime.now(UTC) - _RECENT).isoformat()},
        },
    ):
        path, overrides = run.parameters.get("config"), run.parameters.get("overrides") or []
        key = repr((path, overrides))
        if key not in found:
            found[key] = _opened(path, overrides)
        if watched := found[key]:
            watched.runs.append(run)
    return [watched for watched in found.values() if watched]


def _opened(path: Any, overrides: list[str]) -> Watched | None:
    try:
        config = load_config(path, tuple(overrides))
    except (LlemmaError, OSError, TypeError):
        return None
    return Watched(config) if config.workdir.is_dir() else None


def _runs(client: SyncPrefectClient, wanted: dict[str, Any]) -> list[FlowRun]:
    query = FlowRunFilter.model_validate({"tags": {"all_": [TAG]}, **wanted})
    return client.read_flow_runs(flow_run_filter=query, sort=FlowRunSort.EXPECTED_START_TIME_DESC, limit=200)


def _forget_old(client: SyncPrefectClient) -> None:
    """Delete what the watcher's own runs of two days ago have left."""
    before = (datetime.now(UTC) - 2 * _RECENT).isoformat()
    wanted = {"tags": {"all_": ["watch"]}, "end_time": {"before_": before}}
    for run in client.read_flow_runs(flow_run_filter=FlowRunFilter.model_validate(wanted), limit=100):
        client.delete_flow_run(run.id)
