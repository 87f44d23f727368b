"""Flow: the training job."""

from __future__ import annotations

from prefect import flow

from flows.flow_runs.cancellation import cancel_jobs_of_run
from flows.flow_runs.names import run_name
from flows.stage_flow import run_stage_flow
from tasks.identity.specs import TRAIN
from tasks.identity.stage import StageResult


@flow(name="train", flow_run_name=run_name, on_cancellation=[cancel_jobs_of_run])
def train(config: str, overrides: list[str] | None = None, force: bool = False) -> StageResult:
    """Submit the training job, or follow the one that runs, to the last step.

    Args:
        config: path of the run's YAML file, from the repository or absolute.
        overrides: key=value texts that override it, such as train.steps=100.
        force: make the stage again, though it is finished; training goes on from its checkpoints.
    """
    return run_stage_flow(TRAIN, config, overrides, force)
