"""Flow: the whole chain, from text and base weights to an evaluated Hugging Face model and a report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from prefect import Task, flow
from prefect.artifacts import create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.runtime import deployment, flow_run

from flows.convert import convert
from flows.evaluate import evaluate
from flows.export import export
from flows.flow_runs.cancellation import cancel_jobs_of_run
from flows.flow_runs.deployed import cancel_stages, run_deployed
from flows.flow_runs.interruption import side_by_side
from flows.flow_runs.names import artifact_key, run_name
from flows.flow_runs.pages import StagePage
from flows.prepare_data import prepare_data
from flows.stage_flow import handed_down, opened
from flows.stages import OpenedRun, finished_stage
from flows.train import train
from tasks.identity.specs import CONVERT, EVALUATE, EXPORT, PREPARE_DATA, STAGES, TRAIN, StageName, stages_between
from tasks.identity.stage import StageResult
from tasks.report.run_report import RunReport, write_run_report

FLOWS = {PREPARE_DATA: prepare_data, CONVERT: convert, TRAIN: train, EVALUATE: evaluate, EXPORT: export}
"""Of the stages, by their names."""


@flow(name="llemma-pretrain", flow_run_name=run_name, on_cancellation=[cancel_stages, cancel_jobs_of_run])
def llemma_pretrain(
    config: str,
    overrides: list[str] | None = None,
    force: bool = False,
    start_at: StageName = "prepare-data",
    stop_after: StageName = "export",
) -> RunReport | None:
    """Run every stage that is not finished yet, in order; evaluation runs while training goes on.

    As a deployment's run, each stage is a run of its own deployment; else all are in this process.

    Args:
        config: path of the run's YAML file, from the repository or absolute.
        overrides: key=value texts that override it, such as train.steps=100.
        force: make the stages again, though they are finished; training goes on from its checkpoints.
        start_at: the first stage to run; those before it must be finished.
        stop_after: the last stage to run; there is a report after export only.
    """
    names = stages_between(start_at, stop_after)
    with opened(config, overrides, names) as run:
        if deployment.name:
            call = partial(_call_deployed, run, overrides, force)
        else:
            call = partial(_call_here, overrides, force)
        run, results = _run_stages(run, config, names, call)
        return _report(run, results) if EXPORT in results else None


def _run_stages(
    run: OpenedRun, config: str, names: tuple[str, ...], call: Callable[[str, str], StageResult]
) -> tuple[OpenedRun, dict[str, StageResult]]:
    """The stages of these names, each by `call(stage, config)`; and the run with its training resolved."""
    results: dict[str, StageResult] = {}
    with handed_down(run):
        results |= {name: call(name, config) for name in names if name in (PREPARE_DATA, CONVERT)}
    later = [name for name in names if name not in results]
    if later:
        # From here on nothing that happens to the text, the weights or their artifacts makes it another training.
        run = replace(run, training=run.resolved_training())
    with handed_down(run):
        together = [name for name in later if name != EXPORT]
        if together:
            found = side_by_side(config, *(partial(call, name) for name in together))
            results |= dict(zip(together, found, strict=True))
        if EXPORT in later:
            results[EXPORT] = call(EXPORT, config)
    return run, results


def _call_here(overrides: list[str] | None, force: bool, name: str, config: str) -> StageResult:
    return FLOWS[name](config, overrides, force)


def _call_deployed(run: OpenedRun, overrides: list[str] | None, force: bool, name: str, config: str) -> StageResult:
    parameters = {"config": config, "overrides": overrides, "force": force}
    run_deployed(str(flow_run.id), str(deployment.name), name, parameters, run.config.launch.max_restarts)
    return finished_stage(run, name)


def _report(run: OpenedRun, results: dict[str, StageResult]) -> RunReport:
    every = {name: results.get(name) or finished_stage(run, name) for name in STAGES}
    training = run.resolved_training()
    report: RunReport = Task(write_run_report, name="report", cache_policy=NO_CACHE)(training, every)
    table = [{"what": what, "value": value} for what, value in report.rows]
    key = artifact_key(run.config, "llemma-pretrain")
    create_table_artifact(key=key, table=table, description=f"report: `{report.path}`")
    StagePage(training, "llemma-pretrain").renew(now=True)
    return report
