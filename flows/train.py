"""Flow: the training job."""

from __future__ import annotations

from prefect import flow

from flows.cancellation import cancel_jobs_of_run
from flows.stage_flow import run_stage_flow
from tasks.specs import TRAIN
from tasks.stage import StageResult


@flow(name="train", flow_run_name="train {config}", on_cancellation=[cancel_jobs_of_run])
def train(config: str, overrides: list[str] | None = None) -> StageResult:
    """Submit the training job, or follow the one that runs, to the last step.

    Args:
        config: path of the run's YAML file.
        overrides: key=value texts that override it, such as train.steps=100.
    """
    return run_stage_flow(TRAIN, config, overrides)
