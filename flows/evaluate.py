"""Flow: perplexity of every checkpoint that appears in the object store."""

from __future__ import annotations

from prefect import flow

from flows.cancellation import cancel_jobs_of_run
from flows.stage_flow import run_stage_flow
from tasks.specs import EVALUATE
from tasks.stage import StageResult


@flow(name="evaluate", flow_run_name="evaluate {config}", on_cancellation=[cancel_jobs_of_run])
def evaluate(config: str, overrides: list[str] | None = None) -> StageResult:
    """Wait for checkpoints and evaluate each, until the last step's.

    Args:
        config: path of the run's YAML file.
        overrides: key=value texts that override it, such as train.steps=100.
    """
    return run_stage_flow(EVALUATE, config, overrides)
