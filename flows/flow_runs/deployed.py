"""Stages as runs of their own deployments, each with its history, Retry and Cancel."""

from __future__ import annotations

import logging
import time
from typing import Any, cast
from uuid import UUID

import httpx
from prefect import Flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterIdempotencyKey
from prefect.client.schemas.objects import FlowRun, State
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound, PrefectException
from prefect.states import AwaitingRetry, Cancelling

from flows.flow_runs.interruption import raise_if_interrupted
from neox_core.errors import LlemmaError
from tasks.identity.specs import STAGES

_log = logging.getLogger(__name__)

_POLL_SECONDS = 2.0


def run_deployed(parent: str, deployment: str, stage: str, parameters: dict[str, Any], max_crashes: int = 0) -> None:
    """Have a stage's deployment run, and wait for its end. A run that this parent has started before is taken up: when
    it has completed there is nothing to do, and when it ended otherwise it is tried again.

    Args:
        parent: id of the flow run that calls.
        deployment: the deployment's name, such as toy.
        max_crashes: how often the run is tried again when its process was killed.

    Raises:
        LlemmaError: the stage's run did not complete, or the deployment is not there.
    """
    name = f"{stage}/{deployment}"
    try:
        started = run_deployment(name, parameters=parameters, idempotency_key=_key(parent, stage), timeout=0)
    except ObjectNotFound:
        raise LlemmaError(f"there is no deployment {name}: run `prefect --no-prompt deploy --all`") from None
    run = cast(FlowRun, started)
    with get_client(sync_client=True) as client:
        if _is_final(run) and not _is_completed(run):
            client.set_flow_run_state(run.id, AwaitingRetry(), force=True)
        ended = _wait(client, run.id)
        for count in range(max_crashes):
            if not (ended.state and ended.state.is_crashed()):
                break
            _log.warning("%s crashed: run again (%d of %d times)", ended.name, count + 1, max_crashes)
            client.set_flow_run_state(run.id, AwaitingRetry(), force=True)
            ended = _wait(client, run.id)
    if not _is_completed(ended):
        state = ended.state
        said = " ".join((state.message or "no reason given").split()) if state else "no state"
        raise LlemmaError(
            f"{stage}: {said.removeprefix('Flow run encountered an exception: ')} (run {ended.name!r} ended "
            f"{state.name if state else 'without a state'}; mend the cause, then Retry on this run goes on)"
        )


def cancel_stages(flow: Flow[Any, Any], flow_run: FlowRun, state: State) -> None:
    """Hook for `on_cancellation`: cancel the runs of stages that this one has started."""
    keys = [_key(str(flow_run.id), stage) for stage in STAGES]
    with get_client(sync_client=True) as client:
        wanted = FlowRunFilter(idempotency_key=FlowRunFilterIdempotencyKey(any_=keys))
        for run in client.read_flow_runs(flow_run_filter=wanted):
            if not _is_final(run):
                client.set_flow_run_state(run.id, Cancelling(message=f"{flow_run.name} was cancelled"))
                _log.info("cancelled %s", run.name)


def parent_of(run: FlowRun) -> UUID | None:
    """The run that started this one as a stage of its chain."""
    for stage in STAGES:
        if run.idempotency_key and run.idempotency_key.endswith(_key("", stage)):
            return UUID(run.idempotency_key.removesuffix(_key("", stage)))
    return None


def _key(parent: str, stage: str) -> str:
    return f"{parent}-{stage}"


def _wait(client: SyncPrefectClient, run: UUID) -> FlowRun:
    """The run when it has ended; a server that is away for a while is borne."""
    while True:
        raise_if_interrupted()
        try:
            found = client.read_flow_run(run)
            if _is_final(found):
                return found
        except (httpx.HTTPError, PrefectException) as error:
            if isinstance(error, ObjectNotFound):
                raise LlemmaError(f"flow run {run} was deleted: run again") from error
            _log.warning("the state of run %s is not known: %s", run, error or type(error).__name__)
        time.sleep(_POLL_SECONDS)


def _is_final(run: FlowRun) -> bool:
    return run.state is not None and run.state.is_final()


def _is_completed(run: FlowRun) -> bool:
    return run.state is not None and run.state.is_completed()
