"""Flow: the training job."""

from __future__ import annotations

from prefect import flow

from flows.cancellation import cancel_jobs_of_run
from flows.stage_flow import Row, run_stage_flow
from neox_core.config import RunConfig
from tasks.stage import StageResult
from tasks.train import train as train_stage


@flow(name="train", flow_run_name="train {config}", on_cancellation=[cancel_jobs_of_run])
def train(config: str) -> StageResult:
    """Submit the training job, or follow the one that runs, to the last step.

    Args:
        config: path of the run's YAML file.
    """
    return run_stage_flow("train", config, train_stage, training_table)


def training_table(config: RunConfig, result: StageResult) -> list[Row]:
    """Losses, throughput and checkpoints."""
    return [{"what": name, "value": value} for name, value in result.artifact.summary.items()]
