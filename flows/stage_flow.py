"""What every stage's flow does around its task: open the run, show progress, publish the result."""

from __future__ import annotations

import contextvars
import logging
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager

from prefect import Task
from prefect.artifacts import create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.runtime import flow_run

from flows.flow_runs.at_work import at_work
from flows.flow_runs.interruption import raise_if_interrupted
from flows.flow_runs.names import artifact_key
from flows.flow_runs.pages import StagePage
from flows.progress import stage_progress
from flows.stages import STAGE, OpenedRun, forget_stage, how_it_went, opened_run
from neox_core.config import load_config
from neox_core.errors import LaunchError
from neox_core.progress import Progress
from tasks.identity.specs import CONVERT, PREPARE_DATA, STAGES
from tasks.identity.stage import StageResult

_SIGNAL_SECONDS = 2.0

_handed_down: contextvars.ContextVar[OpenedRun | None] = contextvars.ContextVar("opened run", default=None)


@contextmanager
def opened(config: str, overrides: Collection[str] | None, stages: Collection[str] = STAGES) -> Iterator[OpenedRun]:
    """The run that the flow's parent hands down, else the opened run of its parameters.

    Raises:
        LlemmaError: whatever would keep the run from finishing, in one line, before any long work.
    """
    if run := _handed_down.get():
        yield run
        return
    _log_as_much_as_prefect()
    workdir = load_config(config, tuple(overrides or ())).workdir
    with at_work(workdir, flow_run.id), opened_run(config, overrides or (), stages) as run:
        yield run


@contextmanager
def handed_down(run: OpenedRun) -> Iterator[None]:
    """While the context lasts, child flows work on this very run, whatever becomes of its files meanwhile."""
    token = _handed_down.set(run)
    try:
        yield
    finally:
        _handed_down.reset(token)


def _log_as_much_as_prefect() -> None:
    """Our own lines appear among a flow run's (PREFECT_LOGGING_EXTRA_LOGGERS) if they have Prefect's level."""
    level = min(logging.getLogger("prefect").getEffectiveLevel(), logging.WARNING)
    for package in ("flows", "tasks", "infra", "neox_core"):
        logging.getLogger(package).setLevel(level)


def run_stage_flow(name: str, config: str, overrides: Collection[str] | None, force: bool = False) -> StageResult:
    """Run one stage and publish its result as a table in Prefect.

    The stage decides by its artifact whether there is anything to do, so Prefect's own cache is off: Retry, Run again
    and a new run are the same thing.
    """
    stage = STAGE[name]
    with (
        opened(config, overrides, [name]) as run,
        stage_progress(name, artifact_key(run.config, f"{name}-progress")) as progress,
    ):
        if force:
            forget_stage(run, name)
        try:
            with _page(run, name, progress) as report:
                result = Task(stage.run, name=name, cache_policy=NO_CACHE)(run, report)
        except LaunchError:
            # The signal that cancels a flow ends its local jobs as well, which may be noticed first.
            time.sleep(_SIGNAL_SECONDS)
            raise_if_interrupted()
            raise
        artifact = result.artifact
        create_table_artifact(
            key=artifact_key(run.config, name),
            table=stage.table(run.config, result),
            description=f"{name} {how_it_went(result)}; artifact `{artifact.folder}`, "
            f"fingerprint `{artifact.fingerprint}`",
        )
        return result


@contextmanager
def _page(run: OpenedRun, name: str, progress: Progress) -> Iterator[Progress]:
    """The progress, which also renews the artifacts on the run's page: of stages of a training, as it goes on."""
    if name in (PREPARE_DATA, CONVERT):
        yield progress
        return
    page = StagePage(run.resolved_training(), name)

    def report(share: float, text: str) -> None:
        progress(share, text)
        page.renew()

    try:
        yield report
    finally:
        page.renew(now=True)
