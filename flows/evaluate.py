"""Flow: perplexity of every checkpoint that appears in the object store."""

from __future__ import annotations

from prefect import flow

from flows.cancellation import cancel_jobs_of_run
from flows.stage_flow import Row, run_stage_flow
from neox_core.config import RunConfig
from tasks.evaluate import evaluate as evaluate_stage
from tasks.stage import StageResult


@flow(name="evaluate", flow_run_name="evaluate {config}", on_cancellation=[cancel_jobs_of_run])
def evaluate(config: str) -> StageResult:
    """Wait for checkpoints and evaluate each, until the last step's.

    Args:
        config: path of the run's YAML file.
    """
    return run_stage_flow("evaluate", config, evaluate_stage, perplexity_table)


def perplexity_table(config: RunConfig, result: StageResult) -> list[Row]:
    """A row per checkpoint and source."""
    return [
        {"step": evaluation["step"], "source": source, **values}
        for evaluation in result.artifact.summary["evaluations"]
        for source, values in evaluation["sources"].items()
    ]
