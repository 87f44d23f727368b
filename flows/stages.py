"""The stages: what each does in an opened run, and how its result is shown. Knows nothing of Prefect."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from flows.tables import Row, checkpoint_table, ledger_table, perplexity_table, training_table
from infra.s3.service import storage_service
from neox_core.config import RunConfig, load_config
from neox_core.progress import Progress, with_time_left
from tasks import finished
from tasks.convert import convert
from tasks.evaluate import evaluate
from tasks.export import export
from tasks.identity.specs import CONVERT, EVALUATE, EXPORT, PREPARE_DATA, STAGES, TRAIN
from tasks.identity.stage import StageResult
from tasks.identity.training import Training, resolve_training
from tasks.preflight import check_run
from tasks.prepare import prepare
from tasks.report.run_report import renewing, write_run_report
from tasks.train import train


@dataclass(frozen=True)
class OpenedRun:
    """What a flow resolves once and passes on: the configuration and, once its inputs are there, the training."""

    config: RunConfig
    """With the address of a running object store."""
    training: Training | None = None
    """None: the one on the artifacts that are current when a stage asks for it."""

    def resolved_training(self) -> Training:
        """The training that train, evaluate and export are about.

        Raises:
            LlemmaError: prepare-data or convert was never finished with this configuration.
        """
        return self.training or resolve_training(self.config)


@dataclass(frozen=True)
class Stage:
    """A stage of the chain."""

    name: str
    run: Callable[[OpenedRun, Progress], StageResult]
    table: Callable[[RunConfig, StageResult], list[Row]]


def _with_report(stage: Callable[[Training, Progress], StageResult], run: OpenedRun, progress: Progress) -> StageResult:
    """Run a stage of a training, with a report that is renewed meanwhile."""
    training = run.resolved_training()
    result = stage(training, renewing(training, progress))
    if not result.skipped:
        write_run_report(training)
    return result


STAGE = {
    stage.name: stage
    for stage in (
        Stage(PREPARE_DATA, lambda run, progress: prepare(run.config, with_time_left(progress)), ledger_table),
        Stage(CONVERT, lambda run, progress: convert(run.config, progress), checkpoint_table),
        Stage(TRAIN, lambda run, progress: _with_report(train, run, progress), training_table),
        Stage(EVALUATE, lambda run, progress: _with_report(evaluate, run, with_time_left(progress)), perplexity_table),
        Stage(EXPORT, lambda run, progress: export(run.resolved_training(), progress), checkpoint_table),
    )
}
"""By name, in their order."""


def finished_stage(run: OpenedRun, name: str) -> StageResult:
    """See `tasks.finished.finished_stage`."""
    return finished.finished_stage(run.config, _training_for(run, name), name)


def forget_stage(run: OpenedRun, name: str) -> None:
    """See `tasks.finished.forget_stage`."""
    finished.forget_stage(run.config, _training_for(run, name), name)


def _training_for(run: OpenedRun, name: str) -> Training | None:
    return None if name in (PREPARE_DATA, CONVERT) else run.resolved_training()


@contextmanager
def opened_run(path: str, overrides: Collection[str] = (), stages: Collection[str] = STAGES) -> Iterator[OpenedRun]:
    """A run with its configuration checked for these stages, and its object store running and reachable.

    Args:
        path: the run's YAML file.
        overrides: `key=value` texts; see `load_config`.

    Raises:
        LlemmaError: whatever would keep the stages from finishing, in one line, before any long work.
    """
    config = load_config(path, tuple(overrides))
    check_run(config, stages)
    with storage_service(config.storage, config.workdir) as storage:
        yield OpenedRun(config.model_copy(update={"storage": storage}))


def how_it_went(result: StageResult) -> str:
    """Skipped, or how long it took."""
    return "was finished before" if result.skipped else f"took {result.seconds:.1f} s"
