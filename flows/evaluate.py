"""Flow: perplexity of every checkpoint that appears in the object store."""

from __future__ import annotations

from prefect import flow

from flows.flow_runs.cancellation import cancel_jobs_of_run
from flows.flow_runs.names import run_name
from flows.stage_flow import run_stage_flow
from tasks.identity.specs import EVALUATE
from tasks.identity.stage import StageResult


@flow(name="evaluate", flow_run_name=run_name, on_cancellation=[cancel_jobs_of_run])
def evaluate(config: str, overrides: list[str] | None = None, force: bool = False) -> StageResult:
    """Wait for checkpoints and evaluate each, until the last step's.

    Args:
        config: path of the run's YAML file, from the repository or absolute.
        overrides: key=value texts that override it, such as train.steps=100.
        force: make the stage again, though it is finished.
    """
    return run_stage_flow(EVALUATE, config, overrides, force)
