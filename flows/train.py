"""Flow: the training job."""

from __future__ import annotations

from prefect import flow

from flows.cancellation import cancel_jobs_of_run
from flows.stage_flow import run_stage_flow, summary_table
from tasks.stage import StageResult
from tasks.train import train as train_stage


@flow(name="train", flow_run_name="train {config}", on_cancellation=[cancel_jobs_of_run])
def train(config: str) -> StageResult:
    """Submit the training job, or follow the one that runs, to the last step.

    Args:
        config: path of the run's YAML file.
    """
    return run_stage_flow("train", config, train_stage, summary_table)
