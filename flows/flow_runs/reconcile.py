"""Flow runs whose process is gone: they get a state from which they go on, or that says why they do not."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any

from prefect import Flow
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.exceptions import ObjectNotFound
from prefect.states import AwaitingRetry, Cancelled, Crashed, Failed

from flows.flow_runs.at_work import end_process, forget_process, has_died
from flows.flow_runs.deployed import parent_of
from infra.prefect.services import WORKER, ServiceRecord, default_folder
from neox_core.config import RunConfig
from tasks.identity.training import find_training
from tasks.watch.memory import Memory
from tasks.watch.verdict import Verdict, saved_step, verdict

_log = logging.getLogger(__name__)

_SURE_SECONDS = 2.0
"""Between two looks at a process, so that one which is about to take its lock is not taken for dead."""
_NEVER_BEGAN = 5.0
"""Times the grace: for a run of which no process was ever seen."""
_WORKER_DIED = 2.0
"""Times the grace: the same, where the worker that took the run is not the one of now."""


@dataclass(frozen=True)
class Reconciler:
    """Looks after the flow runs of one configuration."""

    client: SyncPrefectClient
    config: RunConfig
    memory: Memory
    grace_seconds: float
    """A run that has not been in its state for so long is left alone: its process may be starting."""

    def reconcile(self, run: FlowRun) -> State | None:
        """Give a run whose process is gone another state: cancelled, if that was under way; failed, if its job says so
        or it was run again too often; else it is run again. May be called anew after a kill at any point.

        Returns:
            The state that it was given; None: nothing was done.

        Raises:
            NoAnswer: the scheduler does not answer; nothing was done.
        """
        if not self._is_gone(run):
            return None
        if run.state and run.state.type == StateType.CANCELLING:
            return self._finish_cancelling(run)
        found = verdict(self.config, self._began(run))
        if not found.go_on:
            return self._set(run, Failed(message=f"{found.text} (its process is gone too)"))
        if run.state and not run.state.is_final() and self._has_waiting_parent(run):
            return self._set(run, Crashed(message=f"its process is gone; {found.text}; the chain runs it again"))
        return self._run_again(run, found)

    def _run_again(self, run: FlowRun, found: Verdict) -> State | None:
        most = self.config.launch.max_restarts
        if not self.memory.may_rerun(str(run.id), saved_step(find_training(self.config)), most):
            text = f"its process was gone more than {most} times (launch.max_restarts) without a new checkpoint"
            return self._set(run, Failed(message=f"{text}; {found.text}; see the worker's log, then Retry"))
        forget_process(self.config.workdir, str(run.id))
        return self._set(run, AwaitingRetry(message=f"its process was gone: run again; {found.text}"))

    def _finish_cancelling(self, run: FlowRun) -> State | None:
        from flows.llemma_pretrain import FLOWS, llemma_pretrain  # seconds, which a look each minute need not cost

        flows: dict[str, Flow[Any, Any]] = {llemma_pretrain.name: llemma_pretrain, **FLOWS}
        flow = flows[self.client.read_flow(run.flow_id).name]
        assert run.state
        for hook in flow.on_cancellation_hooks:
            hook(flow, run, run.state)
        return self._set(run, Cancelled(message="its process was gone; its jobs were cancelled"))

    def _is_gone(self, run: FlowRun) -> bool:
        assert run.state
        if run.state.type == StateType.CRASHED:
            return parent_of(run) is None  # a chain runs its stages again itself
        age = (datetime.now(UTC) - run.state.timestamp).total_seconds()
        died = partial(has_died, self.config.workdir, str(run.id))
        gone = died() if run.state.type != StateType.PENDING else None
        cancelling = run.state.type == StateType.CANCELLING
        if gone is None:
            return age > self.grace_seconds * (1 if cancelling else self._patience(run.state))
        if age < self.grace_seconds:
            return False
        if cancelling and not gone:  # it would have ended, had its worker not been killed, which alone can tell it
            end_process(self.config.workdir, str(run.id))
        time.sleep(_SURE_SECONDS)
        return died() is True

    def _patience(self, state: State) -> float:
        """Times the grace for which a run may be without a process."""
        worker = ServiceRecord.read(default_folder(), WORKER)
        started = worker.service.started if worker and worker.is_up and worker.service else 0.0
        taken_before = state.type == StateType.PENDING and state.timestamp.timestamp() < started
        return _WORKER_DIED if taken_before else _NEVER_BEGAN

    def _began(self, run: FlowRun) -> float:
        """Unix seconds at which it was last run."""
        states = self.client.read_flow_run_states(run.id)
        starts = [state.timestamp.timestamp() for state in states if state.type == StateType.RUNNING]
        return max(starts, default=0.0)

    def _has_waiting_parent(self, run: FlowRun) -> bool:
        """Whether it is a stage of a chain that has not ended: that one, itself run again if need be, waits for it."""
        parent = parent_of(run)
        try:
            state = self.client.read_flow_run(parent).state if parent else None
        except ObjectNotFound:
            return False
        return state is not None and (not state.is_final() or state.is_crashed())

    def _set(self, run: FlowRun, state: State) -> State | None:
        """Unless the run has got another state since it was looked at."""
        now = self.client.read_flow_run(run.id).state
        if now is None or run.state is None or now.id != run.state.id:
            return None
        self.client.set_flow_run_state(run.id, state, force=True)
        _log.warning("%s was %s: now %s: %s", run.name, run.state.name, state.name, state.message)
        return state
