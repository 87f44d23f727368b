"""What every stage's flow does around its task: open the run, show progress, publish the result."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from prefect import Task
from prefect.artifacts import create_table_artifact
from prefect.cache_policies import NO_CACHE

from flows.interruption import raise_if_interrupted
from flows.progress import stage_progress
from infra.s3.service import storage_service
from neox_core.config import RunConfig, load_config
from neox_core.errors import LaunchError
from neox_core.progress import Progress
from tasks.preflight import check_run
from tasks.stage import StageResult

_SIGNAL_SECONDS = 2.0

Stage = Callable[[RunConfig, Progress], StageResult]
Row = dict[str, Any]


@contextmanager
def opened(config_path: str) -> Iterator[RunConfig]:
    """The configuration, checked, with its object store running and reachable.

    Raises:
        LlemmaError: whatever would keep the run from finishing, in one line, before any long work.
    """
    _log_as_much_as_prefect()
    config = load_config(config_path)
    check_run(config)
    with storage_service(config.storage, config.workdir) as storage:
        yield config.model_copy(update={"storage": storage})


def _log_as_much_as_prefect() -> None:
    """Our own lines appear among a flow run's (PREFECT_LOGGING_EXTRA_LOGGERS) if they have Prefect's level."""
    level = min(logging.getLogger("prefect").getEffectiveLevel(), logging.WARNING)
    for package in ("flows", "tasks", "infra", "neox_core"):
        logging.getLogger(package).setLevel(level)


def run_stage_flow(
    name: str, config_path: str, stage: Stage, table: Callable[[RunConfig, StageResult], list[Row]]
) -> StageResult:
    """Run one stage and publish its result as a table in Prefect.

    The stage decides by its artifact whether there is anything to do, so Prefect's own cache is off: Retry, Run again
    and a new run are the same thing.
    """
    with opened(config_path) as config, stage_progress(name) as progress:
        try:
            result = Task(stage, name=name, cache_policy=NO_CACHE)(config, progress)
        except LaunchError:
            # The signal that cancels a flow ends its local jobs as well, which may be noticed first.
            time.sleep(_SIGNAL_SECONDS)
            raise_if_interrupted()
            raise
        state = "was finished before" if result.skipped else f"took {result.seconds:.1f} s"
        artifact = result.artifact
        create_table_artifact(
            key=name,
            table=table(config, result),
            description=f"{name} {state}; artifact `{artifact.folder}`, fingerprint `{artifact.fingerprint}`",
        )
        return result


def summary_table(config: RunConfig, result: StageResult) -> list[Row]:
    """What a stage found out, and the files that it made."""
    found = [{"what": name, "value": value} for name, value in result.artifact.summary.items()]
    return found + [{"what": file.path, "value": f"{file.size:,} bytes"} for file in result.artifact.files]
