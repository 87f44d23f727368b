"""Flow: the whole chain, from text and base weights to an evaluated Hugging Face model and a report."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from prefect import Task, flow
from prefect.artifacts import create_table_artifact
from prefect.cache_policies import NO_CACHE

from flows.cancellation import cancel_jobs_of_run
from flows.convert import convert
from flows.evaluate import evaluate
from flows.export import export
from flows.interruption import side_by_side
from flows.prepare_data import prepare_data
from flows.stage_flow import handed_down, opened
from flows.train import train
from tasks.report.run_report import RunReport, write_run_report


@flow(name="llemma-pretrain", flow_run_name="llemma-pretrain {config}", on_cancellation=[cancel_jobs_of_run])
def llemma_pretrain(config: str, overrides: list[str] | None = None) -> RunReport:
    """Run every stage that is not finished yet, in order; evaluation runs while training goes on.

    Args:
        config: path of the run's YAML file.
        overrides: key=value texts that override it, such as train.steps=100.
    """
    with opened(config, overrides) as run:
        with handed_down(run):
            prepared = prepare_data(config, overrides)
            converted = convert(config, overrides)
        # From here on nothing that happens to the text, the weights or their artifacts makes it another training.
        with handed_down(replace(run, training=run.resolved_training())):
            trained, evaluated = side_by_side(
                config, partial(train, overrides=overrides), partial(evaluate, overrides=overrides)
            )
            exported = export(config, overrides)
        results = [prepared, converted, trained, evaluated, exported]
        report = Task(write_run_report, name="report", cache_policy=NO_CACHE)(run.config, results)
        table = [{"what": what, "value": value} for what, value in report.rows]
        create_table_artifact(key="llemma-pretrain", table=table, description=f"report: `{report.path}`")
        return report
