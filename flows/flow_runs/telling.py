"""What the watcher tells of a configuration's flow runs and of its training, with a link to the run's page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from prefect.client.schemas.objects import FlowRun
from prefect.utilities.urls import url_for

from flows.flow_runs.deployed import parent_of
from neox_core.config import RunConfig
from tasks.report.places import REPORT_FILE
from tasks.watch.events import training_events
from tasks.watch.memory import Memory
from tasks.watch.notify import Event, tell


def tell_news(config: RunConfig, runs: Sequence[FlowRun], reconciled: Sequence[Event], memory: Memory) -> None:
    """Tell each event that the configuration wants told, once.

    Args:
        runs: the configuration's, the newest first.
        reconciled: what the watcher has done about runs just now.

    Raises:
        LaunchError: the scheduler does not answer, or a local job belongs to another host; what is known is told.
    """
    chains = [run for run in runs if parent_of(run) is None]
    page = _page(chains[0]) if chains else ""
    for event in reconciled:
        _tell(config, event, page, memory)
    for run in chains:
        for event in _ends(config, run):
            _tell(config, event, _page(run), memory)
    for event in training_events(config):
        _tell(config, event, page, memory)


def _tell(config: RunConfig, event: Event, page: str, memory: Memory) -> None:
    if event.kind in config.notify.events:
        line = f"{config.name} in {config.workdir}: {event.text}; next: {event.todo} {page}"
        tell(event, f"{config.name}: {event.kind}", " ".join(line.split()), memory)


def _ends(config: RunConfig, run: FlowRun) -> Iterator[Event]:
    if run.state and run.state.is_failed():
        reason = (run.state.message or "no reason given").removeprefix("Flow run encountered an exception: ")
        todo = "mend the cause, then Retry on the run's page goes on"
        yield Event("failure", f"failed {run.state.id}", f"{run.name} failed: {reason}", todo)
    if run.state and run.state.is_completed():
        report = config.workdir / REPORT_FILE
        todo = f"read {report}" if report.is_file() else "nothing"
        yield Event("finished", f"finished {run.id}", f"{run.name} has finished", todo)


def _page(run: FlowRun) -> str:
    return url_for("flow-run", obj_id=run.id) or ""
